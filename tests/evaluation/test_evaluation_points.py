"""Point clouds, against plain loops, SciPy, and Open3D where it loads."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from moe3d.evaluation import Cloud, estimate_normals, fit_similarity, icp, score_cloud
from moe3d.evaluation.points import POINT_KEYS, Similarity

SEEDS = st.integers(0, 2**32 - 1)


def surface(seed, count=400, side=1.0):
    """Unordered points of a wavy surface."""
    x, y = np.random.default_rng(seed).uniform(-side, side, (2, count))
    return np.column_stack([x, y, 0.3 * np.sin(2 * x) + 0.2 * np.cos(3 * y)])


def motion(seed, angle=0.02, shift=0.02, scale=1.0):
    rng = np.random.default_rng(seed)
    return Similarity(scale, Rotation.from_rotvec(rng.normal(0, angle, 3)).as_matrix(), rng.normal(0, shift, 3))


def open3d():
    try:
        return importlib.import_module("open3d")
    except (ImportError, OSError) as error:
        pytest.skip(f"Open3D does not load here ({str(error).splitlines()[0]})")


def open3d_cloud(points):
    library = open3d()
    cloud = library.geometry.PointCloud()
    cloud.points = library.utility.Vector3dVector(points)
    return cloud


@given(SEEDS, st.integers(3, 30), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_a_similarity_is_recovered(seed, count, scale):
    source = np.random.default_rng(seed).normal(size=(count, 3))
    known = motion(seed + 1, angle=3, shift=5, scale=scale)
    fitted = fit_similarity(source, known.apply(source))
    assert fitted.scale == pytest.approx(scale, rel=1e-6)
    np.testing.assert_allclose(fitted.apply(source), known.apply(source), atol=1e-6)
    assert np.linalg.det(fitted.rotation) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_the_rotation_of_noisy_points_is_scipys(seed):
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(2, 50, 3))
    fitted = fit_similarity(source, target, with_scale=False)
    expected, _ = Rotation.align_vectors(target - target.mean(axis=0), source - source.mean(axis=0))
    np.testing.assert_allclose(fitted.rotation, expected.as_matrix(), atol=1e-9)
    assert fitted.scale == 1


def test_no_other_similarity_is_better():
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(2, 50, 3)) * [1, 2, 3]
    fitted = fit_similarity(source, target)
    error = np.sum((fitted.apply(source) - target) ** 2)
    for seed in range(30):
        change = motion(seed, angle=0.02, shift=0.02, scale=1 + rng.normal(0, 0.02))
        assert np.sum((change.apply(fitted.apply(source)) - target) ** 2) > error


def test_a_mirrored_cloud_is_not_mirrored_back():
    source = surface(0)
    assert np.linalg.det(fit_similarity(source, source * [1, 1, -1]).rotation) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", ["coinciding", "collinear"])
def test_points_that_leave_a_choice_are_mapped_all_the_same(count, shape):
    line = np.zeros((count, 1)) if shape == "coinciding" else np.arange(count)[:, None]
    source = [1.0, 2, 3] + line * [1.0, 0, 0]
    target = [4.0, 5, 6] + line * [0.0, 2, 0]
    np.testing.assert_allclose(fit_similarity(source, target).apply(source), target, atol=1e-12)


def test_wrong_shapes_are_said():
    with pytest.raises(ValueError, match=r"source and target must be \[N, 3\].*got \[2, 3\] and \[3, 3\]"):
        fit_similarity(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="N >= 1"):
        fit_similarity(np.zeros((0, 3)), np.zeros((0, 3)))


def plain_icp(source, target, threshold):
    """Open3D's algorithm with all distances computed anew in every round."""
    total, moved, before = np.eye(4), source, None
    for _ in range(31):
        distance = cdist(moved, target)
        nearest = distance.argmin(axis=1)
        closest = distance.min(axis=1)
        paired = closest < threshold
        fitness = paired.mean()
        rmse = np.sqrt(np.mean(closest[paired] ** 2)) if paired.any() else 0.0
        if not paired.any() or (before and abs(fitness - before[0]) < 1e-6 and abs(rmse - before[1]) < 1e-6) or _ == 30:
            break
        before = fitness, rmse
        here, there = moved[paired], target[nearest[paired]]
        rotation = Rotation.align_vectors(there - there.mean(axis=0), here - here.mean(axis=0))[0].as_matrix()
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = rotation, there.mean(axis=0) - rotation @ here.mean(axis=0)
        total = step @ total
        moved = source @ total[:3, :3].T + total[:3, 3]
    return total


@pytest.mark.parametrize("threshold", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_icp_is_plain_icp(seed, threshold):
    source, target = motion(seed, 0.05, 0.05).apply(surface(seed, 300)), surface(seed + 10, 350)
    found = icp(source, Cloud(target), threshold)
    expected = plain_icp(source, target, threshold)
    np.testing.assert_allclose(found.rotation, expected[:3, :3], atol=1e-9)
    np.testing.assert_allclose(found.translation, expected[:3, 3], atol=1e-9)
    assert found.scale == 1


def test_icp_brings_a_moved_cloud_back():
    cloud = surface(0, 2000)
    moved = motion(1, 0.005, 0.005).apply(cloud)
    found = icp(moved, Cloud(cloud))
    assert np.abs(found.apply(moved) - cloud).max() < 1e-3 < np.abs(moved - cloud).max()


def test_icp_without_a_partner_within_reach_moves_nothing():
    found = icp(surface(0) + 10, Cloud(surface(0)))
    np.testing.assert_array_equal(found.rotation, np.eye(3))
    np.testing.assert_array_equal(found.translation, 0)


@pytest.mark.parametrize(("offset", "rounds"), [(0.0, 1), (0.004, 2)])
def test_icp_stops_when_nothing_changes_any_more(monkeypatch, offset, rounds):
    fitted = []
    monkeypatch.setattr(
        "moe3d.evaluation.points.fit_similarity", lambda *a, **k: fitted.append(1) or fit_similarity(*a, **k)
    )
    grid = np.stack(np.meshgrid(*[np.arange(5) * 0.02] * 3), axis=-1).reshape(-1, 3)
    found = icp(grid + offset, Cloud(grid))
    np.testing.assert_allclose(found.translation, -offset, atol=1e-12)
    assert len(fitted) == rounds


def test_icp_to_a_single_point():
    np.testing.assert_allclose(icp(np.array([[0.01, 0, 0]]), Cloud(np.zeros((1, 3)))).translation, [-0.01, 0, 0])


@pytest.mark.parametrize("count", [3, 10, 31, 200])
def test_normals_are_those_of_a_plain_loop(count):
    points = surface(count, count)
    cloud = Cloud(points)
    normals = np.empty((count, 3))
    normals[cloud.order] = estimate_normals(cloud)
    for point, normal in zip(points, normals, strict=True):
        around = points[np.argsort(np.linalg.norm(points - point, axis=1))[:30]]
        expected = np.linalg.svd(around - around.mean(axis=0))[2][2]
        assert abs(expected @ normal) == pytest.approx(1, abs=1e-6)


def test_normals_of_a_plane_and_of_too_few_points():
    plane = surface(0)
    plane[:, 2] = plane @ [0.5, -0.25, 0]
    direction = np.array([0.5, -0.25, -1]) / np.linalg.norm([0.5, -0.25, -1])
    np.testing.assert_allclose(np.abs(Cloud(plane).normals @ direction), 1)
    np.testing.assert_array_equal(Cloud(plane[:2]).normals, [[0, 0, 1]] * 2)


@pytest.mark.parametrize("sizes", [(200, 150), (1, 200), (200, 1), (2, 2), (40, 40)])
def test_scores_are_those_of_all_distances(sizes):
    prediction, truth = surface(1, sizes[0]) + 0.05, surface(2, sizes[1])
    score = score_cloud(Cloud(prediction), Cloud(truth))
    distance = cdist(prediction, truth)
    there, back = distance.argmin(axis=1), distance.argmin(axis=0)
    normals = []
    for points in (prediction, truth):
        cloud, unsorted = Cloud(points), np.empty_like(points)
        unsorted[cloud.order] = cloud.normals
        normals.append(unsorted)
    one = [abs(normals[0][i] @ normals[1][j]) for i, j in enumerate(there)]
    other = [abs(normals[1][j] @ normals[0][i]) for j, i in enumerate(back)]
    expected = {
        "acc_mean": distance.min(axis=1).mean(),
        "acc_median": np.median(distance.min(axis=1)),
        "comp_mean": distance.min(axis=0).mean(),
        "comp_median": np.median(distance.min(axis=0)),
        "nc_mean": (np.mean(one) + np.mean(other)) / 2,
        "nc_median": (np.median(one) + np.median(other)) / 2,
    }
    assert score.metrics == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(score.distances, distance.min(axis=1))


def test_a_plane_moved_by_a_centimetre():
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, 30), np.linspace(-1, 1, 30)))
    normal = np.array([2, -1, 2]) / 3
    basis = np.linalg.svd(normal[None])[2][1:]
    plane = np.column_stack([x, y]) @ basis + [0, 0, 3]
    metrics = score_cloud(Cloud(plane + 0.01 * normal), Cloud(plane)).metrics
    for key in ("acc_mean", "acc_median", "comp_mean", "comp_median"):
        assert metrics[key] == pytest.approx(0.01)
    assert metrics["nc_mean"] == pytest.approx(1)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_compare_is_undefined(sizes):
    score = score_cloud(*(Cloud(surface(0, size)) for size in sizes))
    assert score.metrics == dict.fromkeys(POINT_KEYS)
    assert score.distances.shape == (sizes[0],) and np.isnan(score.distances).all()


@pytest.mark.parametrize("seed", range(3))
def test_icp_is_open3ds(seed):
    source, target = motion(seed, 0.03, 0.03).apply(surface(seed, 3000)), surface(seed + 10, 3000)
    clouds = open3d_cloud(source), open3d_cloud(target)
    expected = open3d().pipelines.registration.registration_icp(*clouds, 0.1, np.eye(4)).transformation
    found = icp(source, Cloud(target))
    np.testing.assert_allclose(found.rotation, expected[:3, :3], atol=1e-9)
    np.testing.assert_allclose(found.translation, expected[:3, 3], atol=1e-9)


def test_normals_are_open3ds():
    cloud = Cloud(surface(0, 3000))
    other = open3d_cloud(cloud.points)
    other.estimate_normals()
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(other.normals) * cloud.normals, axis=1)), 1, atol=1e-9)

"""Hypersim: its cameras, its trajectories, its tone mapping, and what is left out."""

from __future__ import annotations

import csv
import shutil

import h5py
import numpy as np
import pytest

from moe3d.data import Skipped, open_dataset
from moe3d.data.hypersim import planar_depth, tone_map
from support.datasets import CASES, METRES_PER_UNIT, save_hdf5, save_text

CASE = CASES["hypersim"]
FRAMES = list(CASE.frames)
CAMERAS = "metadata_camera_parameters.csv"
SPLIT = "metadata_images_split_scene_v1.csv"
TRAJECTORY = "ai_001_002/_detail/cam_01/camera_keyframe_"


@pytest.fixture
def root(tmp_path):
    return CASE.written(tmp_path)


def set_column(path, **values):
    """Change columns of every row of a csv file."""
    with path.open(newline="") as file:
        rows = [row | {key: str(value) for key, value in values.items()} for row in csv.DictReader(file)]
    save_text(path, ",".join(rows[0]), *(",".join(row.values()) for row in rows))


def set_dataset(path, change):
    """Rewrite one of Hypersim's HDF5 files."""
    with h5py.File(path) as file:
        values = file["dataset"][()]
    save_hdf5(path, change(values))


@pytest.mark.parametrize("entry", ["M_cam_from_uv_01", "M_cam_from_uv_10", "M_cam_from_uv_20", "M_cam_from_uv_21"])
@pytest.mark.parametrize("tilt", [2e-3, -0.1])
def test_tilted_lenses_are_left_out(root, entry, tilt, caplog):
    set_column(root / CAMERAS, **{entry: tilt})
    with pytest.raises(ValueError, match=r"no frames of the hypersim dataset .*\(skipped: a tilt-shift camera\)"):
        open_dataset("hypersim", root)
    assert caplog.messages == ["hypersim: left out 1 sequence(s), the first ai_001_002_cam_01: a tilt-shift camera"]


def test_skewed_projections_are_left_out(root):
    set_column(root / CAMERAS, M_proj_01=0.01)
    with pytest.raises(ValueError, match="a tilt-shift camera"):
        open_dataset("hypersim", root)


def test_rounding_in_the_published_table_is_no_tilt(root):
    set_column(root / CAMERAS, M_cam_from_uv_21=-4.8e-9)
    sample = open_dataset("hypersim", root).load(CASE.sequence, FRAMES)
    assert (sample.intrinsics[:, 2] == sample.intrinsics.new_tensor([0, 0, 1])).all()


def test_the_intrinsics_are_those_of_the_projection_matrix(root):
    """The published formula, on a matrix without a scale of its own."""
    with (root / CAMERAS).open(newline="") as file:
        row = next(csv.DictReader(file))
    p = {key: -float(row[f"M_proj_{key}"]) / float(row["M_proj_32"]) for key in ("00", "02", "11", "12")}
    height, width = CASE.size
    expected = [
        [p["00"] * width / 2, 0, (1 - p["02"]) * width / 2 - 0.5],
        [0, p["11"] * height / 2, (1 + p["12"]) * height / 2 - 0.5],
        [0, 0, 1],
    ]
    intrinsics = open_dataset("hypersim", root).load(CASE.sequence, FRAMES[:1]).intrinsics[0]
    np.testing.assert_allclose(intrinsics.numpy(), expected, rtol=1e-6)


def test_planar_depth_is_the_third_coordinate():
    rng = np.random.default_rng(3)
    intrinsics = np.array([[31.0, 0, 9.5], [0, 33.0, 2.25], [0, 0, 1]])
    depth = rng.uniform(0.5, 9, (6, 8))
    distance = np.empty_like(depth)
    for row in range(6):
        for column in range(8):
            point = depth[row, column] * np.linalg.solve(intrinsics, [column, row, 1])
            distance[row, column] = np.sqrt(np.sum(point**2))
    assert (distance > 1.01 * depth).any()
    np.testing.assert_allclose(planar_depth(distance, np.linalg.inv(intrinsics)), depth, rtol=1e-12)


def test_unknown_distances_are_not_valid(root):
    unknown = np.arange(CASE.size[0] * CASE.size[1]).reshape(CASE.size) % 3 == 0
    set_dataset(root / CASE.depth, lambda distance: np.where(unknown, np.nan, distance))
    sample = open_dataset("hypersim", root).load(CASE.sequence, FRAMES[1:2])
    assert not sample.valid[0].numpy()[unknown].any()
    assert sample.valid[0].numpy()[~unknown].mean() > 0.9
    assert (sample.depth[0].numpy()[unknown] == 0).all()


def test_positions_are_in_asset_units(root):
    set_column(root / "ai_001_002/_detail/metadata_scene.csv", parameter_value=2 * METRES_PER_UNIT)
    sample = open_dataset("hypersim", root).load(CASE.sequence, FRAMES)
    for k, view in enumerate(CASE.views()):
        np.testing.assert_allclose(sample.extrinsics[k, :, 3].numpy(), 2 * view.extrinsics[:, 3], rtol=1e-5)
        np.testing.assert_allclose(sample.extrinsics[k, :, :3].numpy(), view.extrinsics[:, :3], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("frame_indices", lambda indices: np.where(indices == 5, 99, indices), "does not have this frame"),
        (
            "positions",
            lambda positions: np.where(np.arange(4)[:, None] == 2, np.inf, positions),
            "the pose is not finite",
        ),
        ("orientations", lambda turns: np.where(np.arange(4)[:, None, None] == 2, 0.0, turns), "not a rigid motion"),
    ],
)
def test_frames_without_a_usable_pose_are_left_out(root, kind, change, reason):
    set_dataset(root / f"{TRAJECTORY}{kind}.hdf5", change)
    dataset = open_dataset("hypersim", root)
    assert dataset.load(CASE.sequence, FRAMES).names == [FRAMES[0], FRAMES[2]]
    (skipped,) = dataset.skipped
    assert (skipped.sequence, skipped.frame) == (CASE.sequence, FRAMES[1])
    assert reason in skipped.reason


def test_a_trajectory_that_is_cut_off_has_no_usable_frame(root):
    set_dataset(root / f"{TRAJECTORY}positions.hdf5", lambda positions: positions[:2])
    dataset = open_dataset("hypersim", root)
    with pytest.raises(ValueError, match="none of the 3 frames"):
        dataset.load(CASE.sequence, FRAMES)
    assert all("differ in length" in skipped.reason for skipped in dataset.skipped)


def test_a_scene_without_its_scale_has_no_usable_frame(root):
    save_text(root / "ai_001_002/_detail/metadata_scene.csv", "parameter_name,parameter_value", "other,1")
    dataset = open_dataset("hypersim", root)
    with pytest.raises(ValueError, match="none of the 3 frames asked of 'ai_001_002_cam_01' can be used"):
        dataset.load(CASE.sequence, FRAMES)
    assert {skipped.reason for skipped in dataset.skipped} == {"metadata_scene.csv does not have meters_per_asset_unit"}


def test_files_of_one_frame_must_have_one_size(root):
    set_dataset(root / CASE.depth, lambda distance: distance[1:])
    dataset = open_dataset("hypersim", root)
    assert dataset.load(CASE.sequence, FRAMES).names == [FRAMES[0], FRAMES[2]]
    assert "differ in size" in dataset.skipped[0].reason


def test_only_the_splits_public_images_are_listed(root):
    lines = (root / SPLIT).read_text().splitlines()
    save_text(
        root / SPLIT,
        lines[0],
        "ai_001_002,cam_01,3,True,,val",
        "ai_001_002,cam_01,5,False,OUTSIDE VIEWING AREA (BAD TRAJECTORY),test",
        "ai_001_002,cam_01,7,True,,test",
        "ai_001_002,cam_01,8,True,,test",  # not on disk
        "ai_009_001,cam_00,0,True,,test",  # its scene neither
    )
    assert open_dataset("hypersim", root).sequences == {CASE.sequence: ["frame.0007"]}
    assert open_dataset("hypersim", root, "val").sequences == {CASE.sequence: ["frame.0003"]}
    with pytest.raises(ValueError, match="no frames of the hypersim dataset"):
        open_dataset("hypersim", root, "train")


def test_a_scene_without_camera_parameters_is_left_out(root):
    renamed = (root / CAMERAS).read_text().replace("ai_001_002", "ai_001_003")
    (root / CAMERAS).write_text(renamed)
    with pytest.raises(ValueError, match=f"{CAMERAS} does not have the scene"):
        open_dataset("hypersim", root)


def test_trajectories_of_one_scene_are_sequences(root):
    for folder in ("images/scene_{}_final_hdf5", "images/scene_{}_geometry_hdf5", "_detail/{}"):
        shutil.copytree(root / "ai_001_002" / folder.format("cam_01"), root / "ai_001_002" / folder.format("cam_00"))
    rows = (root / SPLIT).read_text().splitlines()
    save_text(root / SPLIT, *rows, *(row.replace("cam_01", "cam_00") for row in rows[1:]))
    dataset = open_dataset("hypersim", root)
    assert list(dataset.sequences) == ["ai_001_002_cam_01", "ai_001_002_cam_00"]
    assert dataset.load("ai_001_002_cam_00", FRAMES).names == FRAMES
    assert dataset.skipped == []


def slow_tone_map(colour: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """Pixel by pixel in float64."""
    brightness = sorted(
        0.3 * r + 0.59 * g + 0.11 * b
        for (r, g, b), counted in zip(colour.reshape(-1, 3), lit.ravel(), strict=True)
        if counted
    )
    scale = 1.0
    if brightness:
        position = 0.9 * (len(brightness) - 1)
        low = int(position)
        high = min(low + 1, len(brightness) - 1)
        percentile = brightness[low] + (position - low) * (brightness[high] - brightness[low])
        scale = 0.8**2.2 / percentile if percentile >= 1e-4 else 0.0
    return np.array([min(max(scale * value, 0) ** (1 / 2.2), 1) for value in colour.ravel()]).reshape(colour.shape)


@pytest.mark.parametrize("brightness", [1e-6, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_tone_mapping(brightness, share):
    rng = np.random.default_rng(1)
    colour = (brightness * rng.lognormal(size=(9, 7, 3)) - 0.1 * brightness).astype(np.float32)
    lit = rng.random((9, 7)) < share
    mapped = tone_map(colour, lit)
    np.testing.assert_allclose(mapped, slow_tone_map(colour.astype(float), lit), atol=2e-6)
    assert mapped.dtype == np.float32


def test_the_90th_percentile_of_what_is_lit_becomes_four_fifths():
    colour = np.full((10, 10, 3), 5.0, np.float32)
    colour[:, 5:] = 1e4  # the sky
    lit = np.zeros((10, 10), bool)
    lit[:, :5] = True
    mapped = tone_map(colour, lit)
    np.testing.assert_allclose(mapped[:, :5], 0.8, rtol=1e-5)
    assert (mapped[:, 5:] == 1).all()


def test_colours_that_are_not_finite_do_not_spread():
    colour = np.full((10, 10, 3), 2.0, np.float32)
    colour[0, 0], colour[0, 1], colour[0, 2] = np.nan, np.inf, -np.inf
    mapped = tone_map(colour, np.ones((10, 10), bool))
    np.testing.assert_allclose(mapped[1:], 0.8, rtol=1e-5)
    assert (mapped[0, 0] == 0).all()
    assert (mapped[0, 1] == 1).all()
    assert (mapped[0, 2] == 0).all()


def test_images_are_tone_mapped_by_what_shows_an_object(root):
    lit = np.arange(CASE.size[0] * CASE.size[1]).reshape(CASE.size) % 5 > 1
    for name in ("render_entity_id", "depth_meters"):
        path = root / CASE.depth.replace("0005.depth_meters", f"0003.{name}")
        set_dataset(path, lambda values: np.where(lit, values, -1))
    linear = ((CASE.views()[0].image / 255) ** 2.2).astype(np.float16).astype(float)
    linear[~lit] *= 0.1
    set_dataset(root / CASE.image.replace("0005", "0003"), lambda colour: linear.astype(np.float16))
    image = open_dataset("hypersim", root).load(CASE.sequence, FRAMES[:1]).images[0]
    expected = slow_tone_map(linear.astype(np.float16).astype(float), lit)
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_what_is_skipped_is_a_record(root):
    (root / CASE.image).unlink()
    dataset = open_dataset("hypersim", root)
    assert dataset.sequences == {CASE.sequence: [FRAMES[0], FRAMES[2]]}  # no colour, no frame
    (root / CASE.depth.replace("0005", "0007")).unlink()
    dataset.load(CASE.sequence, [FRAMES[0], FRAMES[2]])
    assert dataset.skipped == [Skipped(CASE.sequence, FRAMES[2], "frame.0007.depth_meters.hdf5 is missing")]

"""Ray casting against what defines the shapes: their implicit functions, and a polynomial root finder for the torus."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.data.synthetic import primitives as shapes
from moe3d.data.synthetic.primitives import Primitives, intersect, local_normals

UNCUT = np.zeros(4)
SOLIDS = {"box": shapes.BOX, "ellipsoid": shapes.ELLIPSOID, "frustum": shapes.FRUSTUM, "torus": shapes.TORUS}


def outside(kind: int, p: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Positive outside the solid, negative inside, zero on its surface; p is [3, ...]."""
    rho = np.hypot(p[0], p[1])
    if kind == shapes.BOX:
        return np.max([np.abs(c) - s for c, s in zip(p, size, strict=True)], axis=0)
    if kind == shapes.ELLIPSOID:
        return np.sqrt(sum((c / s) ** 2 for c, s in zip(p, size, strict=True))) - 1
    if kind == shapes.FRUSTUM:
        bottom, top, half = size
        return np.maximum(rho - (bottom + top) / 2 - (top - bottom) / (2 * half) * p[2], np.abs(p[2]) - half)
    return np.hypot(rho - size[0], p[2]) - size[1]


def draw(rng: np.random.Generator, kind: int, rays: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A shape's size, a point outside it, and directions [3, rays] that mostly pass near it."""
    size = np.exp(rng.uniform(np.log(0.01), np.log(2), 3))
    if kind == shapes.TORUS:
        size[1] = size[0] * rng.uniform(0.02, 0.9)
        size[2] = size[1]
    reach = np.linalg.norm(size) * 2
    origin = rng.normal(0, 1, 3)
    origin *= reach * rng.uniform(1.2, 30) / np.linalg.norm(origin)
    target = rng.normal(0, 0.6, (3, rays)) * size.max()
    return size, origin, (target - origin[:, None]) * rng.uniform(0.2, 2)


@pytest.mark.parametrize("kind", SOLIDS.values(), ids=SOLIDS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_hits_are_the_first_points_on_the_surface(kind, seed):
    rng = np.random.default_rng(seed)
    size, origin, direction = draw(rng, kind, 60)
    t = intersect(kind, origin, direction, size, UNCUT)
    hit = np.isfinite(t)
    # The implicit functions have slopes up to 1 / size and the ellipsoid's is relative: scale the tolerance alike.
    tolerance = 1e-9 * np.linalg.norm(origin) / size.min()
    surface = outside(kind, origin[:, None] + t[hit] * direction[:, hit], size)
    assert np.abs(surface).max(initial=0) < tolerance
    before = np.linspace(0, 1, 3000)[:, None] * np.where(hit, t, 2.0)  # 2: twice as far as the target of the ray
    along = origin[:, None, None] + before * direction[:, None]
    assert outside(kind, along, size).min() > -tolerance


@pytest.mark.parametrize("kind", [shapes.BOX, shapes.ELLIPSOID, shapes.FRUSTUM])
def test_rays_from_within_leave_through_the_surface(kind):
    size, origin = np.array([0.6, 0.4, 0.5]), np.array([0.2, -0.1, 0.1])
    direction = np.random.default_rng(5).normal(0, 1, (3, 200))
    t = intersect(kind, origin, direction, size, UNCUT)
    assert np.abs(outside(kind, origin[:, None] + t * direction, size)).max() < 1e-12


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_torus_hits_are_the_smallest_roots_of_its_quartic(seed):
    rng = np.random.default_rng(seed)
    (ring, tube, _), origin, direction = draw(rng, shapes.TORUS, 40)
    t = intersect(shapes.TORUS, origin, direction, np.array([ring, tube, tube]), UNCUT)
    for hit, d in zip(t, direction.T, strict=True):
        scale = np.linalg.norm(origin)
        o, v, r2 = origin / scale, d / scale, (ring / scale) ** 2
        square = np.polynomial.Polynomial([o @ o + r2 - (tube / scale) ** 2, 2 * o @ v, v @ v])
        flat = np.polynomial.Polynomial([o[:2] @ o[:2], 2 * o[:2] @ v[:2], v[:2] @ v[:2]])
        roots = (square**2 - 4 * r2 * flat).roots()
        spread = np.abs(roots.imag) / np.abs(roots)
        if ((spread > 1e-9) & (spread < 1e-3)).any():
            continue  # a grazing ray: whether the double root is real is beyond the root finder's accuracy
        real = roots.real[(np.abs(roots.imag) < 1e-6 * np.abs(roots)) & (roots.real > 0)]
        assert np.isfinite(hit) == (len(real) > 0)
        if len(real):
            assert hit == pytest.approx(real.min(), rel=1e-5)


def test_shadows_have_the_areas_of_trimeshs():
    """A third opinion on all hits and misses at once: how much of a bundle of parallel rays a convex solid blocks."""
    profile = [[0, -0.5], [0.3, -0.5], [0.1, 0.5], [0, 0.5]]
    cases = {
        shapes.BOX: ([0.4, 0.3, 0.5], trimesh.creation.box(extents=[0.8, 0.6, 1.0])),
        shapes.ELLIPSOID: ([0.4, 0.4, 0.4], trimesh.creation.icosphere(subdivisions=5, radius=0.4)),
        shapes.FRUSTUM: ([0.3, 0.1, 0.5], trimesh.creation.revolve(profile, sections=256)),
    }
    axis = np.array([0.2, -0.3, 0.9])
    axis /= np.linalg.norm(axis)
    across = np.linalg.svd(axis[None])[2][1:]
    grid = np.stack(np.meshgrid(*[np.arange(-0.7, 0.7, 0.01)] * 2), -1).reshape(-1, 2)
    far = 1e4  # so far that rays from one point are parallel
    direction = (grid @ across + far * axis).T
    for kind, (size, mesh) in cases.items():
        blocked = np.isfinite(intersect(kind, -far * axis, direction, np.array(size), UNCUT)).sum() * 0.01**2
        shadow = np.abs(mesh.face_normals @ axis) @ mesh.area_faces / 2  # convex: a ray enters one face, leaves another
        assert blocked == pytest.approx(shadow, rel=0.01)


@pytest.mark.parametrize("kind", SOLIDS.values(), ids=SOLIDS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_normals_are_the_gradients_of_the_implicit_functions(kind, seed):
    rng = np.random.default_rng(seed)
    size, origin, direction = draw(rng, kind, 60)
    t = intersect(kind, origin, direction, size, UNCUT)
    points = origin[:, None] + t[np.isfinite(t)] * direction[:, np.isfinite(t)]
    normals = local_normals(kind, points, np.broadcast_to(size[:, None], points.shape))
    normals = normals / np.linalg.norm(normals, axis=0)
    h = 1e-5 * size.min()
    steps = h * np.eye(3)[:, :, None]
    gradient = np.stack([outside(kind, points + s, size) - outside(kind, points - s, size) for s in steps])
    twice = np.stack([outside(kind, points + 9 * s, size) - outside(kind, points - 9 * s, size) for s in steps])
    smooth = np.abs(twice - 9 * gradient).max(0, initial=0) < 1e-2 * np.abs(gradient).max(0, initial=1e-30)
    gradient = gradient / np.linalg.norm(gradient, axis=0)
    assert (~smooth).sum() <= max(1, 0.1 * len(smooth))  # one may be on an edge, however few the rays hit
    assert ((gradient * normals).sum(0)[smooth] > 1 - 1e-4).all()


def covered(
    cutout: tuple[float, ...], x: np.ndarray, y: np.ndarray, size: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Whether rays straight down on the panel at (x, y) hit it."""
    origin = np.array([0.0, 0.0, 1.0])
    direction = np.stack([x, y, -np.ones_like(x)])
    t = intersect(shapes.PANEL, origin, direction, np.array([*size, 0.0]), np.array(cutout))
    assert np.isin(t, [1.0, np.inf]).all()
    return np.isfinite(t)


@pytest.mark.parametrize(
    ("cutout", "area"),
    [
        ((shapes.SOLID, 0, 0, 0), 1),
        ((shapes.DISC, 0, 0, 0), np.pi / 4),
        ((shapes.RING, 0.6, 0, 0), np.pi / 4 * (1 - 0.36)),
        ((shapes.ROUND_HOLES, 0.1, 0.03, 0), 1 - np.pi * 0.09),
        ((shapes.LATTICE, 0.1, 0.2, 0.02), 1 - 0.8 * 0.9),
        ((shapes.OPENING, 0.1, 0.3, 0.7), 1 - 0.21),
        ((shapes.SPOKES, 5, 0.0, 0.0), np.pi / 4 * (1 - 0.92**2 + 0.2**2)),
    ],
)
def test_cut_outs_leave_the_area_they_should(cutout, area):
    x, y = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 200_000))
    assert covered(cutout, x, y).mean() == pytest.approx(area, abs=0.005)  # 4 sigma of the count


def test_panels_end_at_their_edges():
    x, y = np.array([0.29, 0.31, 0.0, 0.0]), np.array([0.0, 0.0, 0.19, 0.21])
    assert covered((shapes.SOLID, 0, 0, 0), x, y, (0.3, 0.2)).tolist() == [True, False, True, False]


def test_doorways_reach_the_floor():
    x, y = np.array([0.1, 0.1, -0.2]), np.array([-0.49, 0.21, -0.49])
    assert covered((shapes.OPENING, 0.1, 0.3, 0.7), x, y).tolist() == [False, True, True]


def test_spokes_repeat_around_the_hub():
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-0.4, 0.4, (2, 5000))
    turned = (x + 1j * y) * np.exp(2j * np.pi / 7)
    cutout = (shapes.SPOKES, 7, 0.04, 0.6)
    first = covered(cutout, x, y)
    assert 0.05 < first.mean() < 0.95
    assert np.array_equal(first, covered(cutout, turned.real, turned.imag))


def test_nothing_behind_the_origin_is_hit():
    origin, away = np.array([0.0, 0.0, 5.0]), np.array([[0.0], [0.0], [1.0]])
    size = np.array([1.0, 0.5, 0.5])
    for kind in range(5):
        assert np.isinf(intersect(kind, origin, away, size, UNCUT)).all()
        aimed = np.array([[-0.8], [0.0], [-5.0]]) if kind == shapes.TORUS else -away
        assert np.isfinite(intersect(kind, origin, aimed, size, UNCUT)).all()


def test_bounding_boxes_hold_their_shapes():
    rng = np.random.default_rng(3)
    for kind in SOLIDS.values():
        size, origin, direction = draw(rng, kind, 4000)
        t = intersect(kind, origin, direction, size, UNCUT)
        points = (origin[:, None] + t * direction)[:, np.isfinite(t)]
        one = Primitives(np.array([kind]), np.zeros((1, 3)), np.eye(3)[None], size[None], UNCUT[None])
        extent = one.half_extent()[0]
        assert (np.abs(points).max(1) <= extent * (1 + 1e-9)).all()
        assert (np.abs(points).max(1) > 0.8 * extent).any()
        assert np.array_equal(np.abs(one.corners()[0]), np.broadcast_to(extent, (8, 3)))

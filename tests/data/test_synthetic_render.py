"""The renderer on small scenes that are known exactly, and against itself without its short cuts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from skimage.color import rgb2xyz

from moe3d.data.synthetic import primitives as shapes
from moe3d.data.synthetic import render, textures
from moe3d.data.synthetic.objects import FURNITURE, Palette, assemble, ball, box, panel, place, rod
from moe3d.data.synthetic.render import Camera, Light, Renderer, Scene, Sensor, expose, trace
from moe3d.data.synthetic.scenes import draw_scene

SENSOR = Sensor(brightness=0.2, contrast=1.0, white_balance=np.ones(3), blur=0.0, noise=0.0, vignetting=0.0)


def plain(palette: Palette, albedo: float = 0.5) -> int:
    material = palette.new(textures.PLAIN, first=np.full(3, albedo), specular=0.0)
    palette.rows[material] = (*palette.rows[material][:4], 0.0, *palette.rows[material][5:])  # no dirt
    return material


def scene(parts, palette: Palette, lights=(), ambient: float = 0.0, sky: float = 0.0) -> Scene:
    return Scene(
        primitives=assemble(parts),
        material=np.array([part.material for part in parts]),
        materials=palette.table(),
        lights=list(lights),
        ambient=np.full((2, 3), ambient),
        sky=np.full((2, 3), sky),
        cameras=[],
    )


def looking_along_y(fov: float = 60.0) -> Camera:
    return Camera.look_at(np.array([0.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.radians(fov))


def test_cameras_look_where_they_should_and_stand_upright():
    camera = Camera.look_at(np.array([1.0, -2.0, 1.5]), np.array([0.5, 3.0, 0.2]), 1.0)
    np.testing.assert_allclose(camera.rotation @ camera.rotation.T, np.eye(3), atol=1e-15)
    assert np.linalg.det(camera.rotation) == pytest.approx(1)
    x, y, z = camera.extrinsics() @ [0.5, 3.0, 0.2, 1.0]
    assert (x, y) == pytest.approx((0, 0), abs=1e-12)
    assert z == pytest.approx(np.linalg.norm([0.5, 5.0, 1.3]))
    right, down, _ = camera.rotation
    assert right[2] == pytest.approx(0)
    assert down[2] < 0


def test_field_of_view_spans_the_longer_side():
    camera = looking_along_y(90)
    for size in ((40, 60), (60, 40)):
        k = camera.intrinsics(size)
        assert k[0, 0] == k[1, 1] == pytest.approx(30)
        assert k[:2, 2].tolist() == [(size[1] - 1) / 2, (size[0] - 1) / 2]


def test_depth_of_a_wall_is_planar():
    palette = Palette(np.random.default_rng(0))
    wall = panel([0, 3, 0], [0, -1, 0], 50, 50, plain(palette))
    view = Renderer(scene([wall], palette)).view(looking_along_y(100), (31, 41))
    np.testing.assert_allclose(view.depth, 3, rtol=1e-6)
    np.testing.assert_allclose(view.normals, np.broadcast_to([0, 0, -1], (31, 41, 3)), atol=1e-6)


def test_a_sphere_is_where_the_pinhole_puts_it():
    palette = Palette(np.random.default_rng(0))
    sphere = ball([0.5, 4, 0.3], [0.6, 0.6, 0.6], plain(palette))
    camera, size = looking_along_y(), (60, 80)
    view = Renderer(scene([sphere], palette)).view(camera, size)
    k = camera.intrinsics(size)
    v, u = np.mgrid[:60, :80]
    ray = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones((60, 80))], -1)
    centre = np.array([0.5, -0.3, 4])  # in the camera's frame: x right, y down, z forward
    a, b, c = (ray**2).sum(-1), ray @ centre, centre @ centre - 0.36
    root = b**2 - a * c
    expected = np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, 0)
    np.testing.assert_allclose(view.depth, expected, rtol=1e-6)
    normal = (ray * expected[..., None] - centre) / 0.6
    np.testing.assert_allclose(view.normals[root > 0], normal[root > 0], atol=1e-5)
    assert (view.normals[root <= 0] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_short_cuts_of_tracing_change_nothing(seed):
    """Every primitive on every ray, in order, without screen bounds or hidden ones left out."""
    drawn = draw_scene(np.random.default_rng(seed))
    camera = drawn.cameras[seed]
    x, y = np.linspace(-0.6, 0.6, 60), np.linspace(-0.4, 0.4, 40)
    depth, index = trace(drawn.primitives, camera, x, y)
    ray = camera.rotation.T @ np.stack(np.broadcast_arrays(x, y[:, None], 1.0)).reshape(3, -1)
    everything = []
    p = drawn.primitives
    for kind, centre, rotation, size, cutout in zip(p.kind, p.centre, p.rotation, p.size, p.cutout, strict=True):
        origin = rotation.T @ (camera.position - centre)
        t = shapes.intersect(kind, origin, rotation.T @ ray, size, cutout)
        everything.append(np.where(t > render.NEAR, t, np.inf).reshape(depth.shape))
    expected = np.min(everything, axis=0)
    # Rays along an edge may fall on either side of it in the last bit.
    same = np.isclose(depth, expected, rtol=1e-6) | (np.isinf(depth) & np.isinf(expected))
    assert same.mean() > 0.998
    hit = (index >= 0) & same
    chosen = np.take_along_axis(np.array(everything), np.maximum(index, 0)[None], 0)[0]
    np.testing.assert_allclose(chosen[hit], depth[hit], rtol=1e-6)


def test_bands_of_rows_join_without_a_seam(monkeypatch):
    drawn = draw_scene(np.random.default_rng(3))
    renderer = Renderer(drawn)
    whole = renderer.view(drawn.cameras[0], (37, 50))
    monkeypatch.setattr(render, "SAMPLES_AT_ONCE", 1000)
    banded = renderer.view(drawn.cameras[0], (37, 50))
    np.testing.assert_allclose(banded.depth, whole.depth, rtol=1e-6)
    np.testing.assert_allclose(banded.radiance, whole.radiance, atol=1e-4)
    np.testing.assert_allclose(banded.normals, whole.normals, atol=1e-4)


def test_light_follows_lamberts_law_and_falls_with_distance():
    palette = Palette(np.random.default_rng(0))
    floor = panel([0, 0, 0], [0, 0, 1], 20, 20, plain(palette, 0.5))
    lamp = Camera.look_at(np.array([0.0, 0.0, 2.0]), np.array([0.0, 0.01, 0.0]), 1.0)
    light = Light(lamp, np.array([1.0, 0.8, 0.6]), reach=2.0, shadow=False)
    camera = Camera.look_at(np.array([0.0, -1.0, 3.0]), np.array([0.0, 0.0, 0.0]), np.radians(70))
    view = Renderer(scene([floor], palette, [light], ambient=0.1)).view(camera, (41, 41))
    k, e = camera.intrinsics((41, 41)), camera.extrinsics()
    for row, column in ((20, 20), (5, 30), (35, 8)):
        ray = np.linalg.inv(k) @ [column, row, 1] * view.depth[row, column]
        point = e[:, :3].T @ (ray - e[:, 3])
        assert point[2] == pytest.approx(0, abs=1e-5)
        square = point @ point + 4 - 4 * point[2]
        cosine = 2 / np.sqrt(square)
        expected = 0.5 * (0.1 + np.array([1.0, 0.8, 0.6]) * cosine * 4 / (0.15 * 4 + 0.85 * square))
        np.testing.assert_allclose(view.radiance[row, column], expected, rtol=2e-3)


def test_shadows_fall_behind_what_blocks_the_light():
    palette = Palette(np.random.default_rng(0))
    parts = [panel([0, 0, 0], [0, 0, 1], 20, 20, plain(palette)), ball([0, 0, 1], [0.3, 0.3, 0.3], plain(palette))]
    lamp = Camera.look_at(np.array([0.0, 0.0, 3.0]), np.array([0.0, 0.01, 0.0]), np.radians(120))
    camera = Camera.look_at(np.array([0.0, -3.0, 3.0]), np.array([0.0, 0.0, 0.0]), np.radians(45))
    lit, shaded = (
        Renderer(scene(parts, palette, [Light(lamp, np.ones(3), 3.0, shadow)], 0.1)).view(camera, (81, 81))
        for shadow in (False, True)
    )
    k, e = camera.intrinsics((81, 81)), camera.extrinsics()
    v, u = np.mgrid[:81, :81]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T * lit.depth[..., None]
    points = (rays - e[:, 3]) @ e[:, :3]
    on_floor = binary_erosion((lit.depth > 0) & (np.abs(points[..., 2]) < 1e-4))  # pixels without a part of the ball
    radius = np.hypot(points[..., 0], points[..., 1])
    # The cone from the lamp, 3 above the floor, that touches the ball of radius 0.3, 2 below the lamp.
    edge = 3 * np.tan(np.arcsin(0.3 / 2))
    deep, clear = on_floor & (radius < edge - 0.08), on_floor & (radius > edge + 0.08) & (radius < 4)
    assert deep.sum() > 5
    np.testing.assert_allclose(shaded.radiance[deep], 0.05, rtol=0.01)  # the ambient light alone
    np.testing.assert_allclose(shaded.radiance[clear], lit.radiance[clear], rtol=1e-3)


def test_edges_are_smooth_in_the_image_and_sharp_in_the_depth():
    palette = Palette(np.random.default_rng(0))
    parts = [
        panel([0, 5, 0], [0, -1, 0], 50, 50, plain(palette, 0.9)),
        rod([-0.5, 2, -2], [0.6, 2, 2], 0.2, plain(palette, 0.1)),
    ]
    view = Renderer(scene(parts, palette, ambient=1.0)).view(looking_along_y(), (60, 60))
    near, far = view.depth < 2.3, view.depth > 4.9
    assert (near | far).all()
    mixed = (view.radiance[..., 0] > 0.15) & (view.radiance[..., 0] < 0.85)
    assert 40 < mixed.sum() < 400


def test_exposure_encodes_srgb():
    radiance = np.full((8, 8, 3), 3.0, np.float32)
    image = expose(radiance, SENSOR, np.random.default_rng(0))
    linear = 0.2 / (1 + 0.2 * 0.2**2)
    assert np.unique(image).size == 1
    white = rgb2xyz(np.ones((1, 1, 3)))[0, 0, 1]
    assert rgb2xyz(image[:1, :1])[0, 0, 1] / white == pytest.approx(linear, abs=0.005)
    assert np.allclose(image * 255, np.round(image * 255), atol=1e-4)


def test_noise_blur_and_vignetting_do_what_they_say():
    rng = np.random.default_rng
    flat = np.full((64, 64, 3), 1.0, np.float32)
    noisy = expose(flat, Sensor(0.2, 1.0, np.ones(3), 0.0, 0.03, 0.0), rng(0))
    assert 0.01 < noisy.std() < 0.05
    dark = expose(flat, Sensor(0.2, 1.0, np.ones(3), 0.0, 0.0, 0.5), rng(0))
    assert dark[0, 0, 0] < dark[32, 32, 0] - 0.05
    checker = np.indices((64, 64)).sum(0)[..., None] % 2 * np.ones(3, np.float32) + 0.1
    checker = checker.astype(np.float32)
    sharp, soft = (expose(checker, Sensor(0.2, 1.0, np.ones(3), blur, 0.0, 0.0), rng(0)) for blur in (0, 1))
    assert soft.std() < 0.2 * sharp.std()
    flatter, harder = (expose(checker, Sensor(0.2, c, np.ones(3), 0.0, 0.0, 0.0), rng(0)) for c in (1.0, 1.5))
    assert harder.min() < flatter.min()


@pytest.mark.parametrize("maker", [maker for maker, _, _ in FURNITURE], ids=lambda m: m.__name__)
def test_objects_stand_on_the_floor_and_scale(maker):
    drawn = [maker(np.random.default_rng(k), Palette(np.random.default_rng(k))) for k in range(4)]
    for parts in drawn:
        corners = assemble(parts).corners().reshape(-1, 3)
        assert corners[:, 2].min() > -1.0
        assert corners[:, 2].max() > 0.1
        assert np.abs(corners).max() < 6
        moved = assemble(place(parts, [1, 2, 3], yaw=0.7, scale=0.5)).corners().reshape(-1, 3)
        extent = np.linalg.norm(np.ptp(corners, axis=0))
        np.testing.assert_allclose(
            np.linalg.norm(moved - moved[0], axis=1),
            0.5 * np.linalg.norm(corners - corners[0], axis=1),
            atol=1e-9 * extent,
        )


def test_scaled_cut_outs_are_the_same_picture_nearer():
    palette = Palette(np.random.default_rng(0))
    mesh = (shapes.LATTICE, 0.13, 0.2, 0.03)
    for cutout in (mesh, (shapes.ROUND_HOLES, 0.2, 0.07, 0), (shapes.SPOKES, 6, 0.05, 0.4), (shapes.RING, 0.5, 0, 0)):
        part = panel([0, 2, 0], [0, -1, 0], 1.6, 1.6, plain(palette), cutout)
        whole = Renderer(scene([part], palette)).view(looking_along_y(), (50, 50))
        half = Renderer(scene(place([part], [0, 0, 0], scale=0.5), palette)).view(looking_along_y(), (50, 50))
        assert 0.02 < (whole.depth > 0).mean() < 0.6
        assert ((half.depth > 0) == (whole.depth > 0)).mean() > 0.999


def test_textures_are_colours_and_fade_with_distance():
    rng = np.random.default_rng(0)
    palette = Palette(rng)
    for pattern in range(9):
        palette.new(pattern, 0.2, first=np.full(3, 0.8), second=np.full(3, 0.1))
    points = rng.uniform(-3, 3, (3, 4000)).astype(np.float32)
    normals = np.broadcast_to(np.float32([[0], [0], [1]]), points.shape)
    for pattern in range(9):
        materials = palette.table()[np.full(4000, pattern)]
        near = textures.albedo(materials, points, normals, np.full(4000, 1e-3, np.float32))
        assert near.shape == (3, 4000)
        assert near.dtype == np.float32
        assert near.min() > 0
        assert near.max() < 1
        assert np.array_equal(near, textures.albedo(materials, points, normals, np.full(4000, 1e-3, np.float32)))
        far = textures.albedo(materials, points, normals, np.full(4000, 10.0, np.float32))
        if pattern in (textures.CHECKER, textures.STRIPES, textures.CLOUDS, textures.SPECKLE, textures.BRICKS):
            assert far.std() < near.std()


def test_a_checkerboard_alternates():
    palette = Palette(np.random.default_rng(0))
    material = palette.new(textures.CHECKER, 0.5, first=np.full(3, 0.8), second=np.full(3, 0.1))
    palette.rows[material] = (*palette.rows[material][:4], 0.0, *palette.rows[material][5:])
    x, y = (np.mgrid[:4, :4] * 0.5 + 0.25).reshape(2, -1).astype(np.float32)
    normals = np.broadcast_to(np.float32([[0], [0], [1]]), (3, 16))
    colour = textures.albedo(
        palette.table()[np.zeros(16, int)], np.stack([x, y, 0 * x]), normals, np.full(16, 1e-3, np.float32)
    )
    expected = np.where(np.indices((4, 4)).sum(0).reshape(-1) % 2, 0.1, 0.8)
    np.testing.assert_allclose(colour[0], expected, atol=1e-6)


def test_noise_repeats_without_a_seam():
    p = np.random.default_rng(0).random((3, 500)).astype(np.float32)
    noise = textures._noise(p)
    assert 0 <= noise.min() < 0.35
    assert 0.65 < noise.max() <= 1
    np.testing.assert_allclose(textures._noise(p + np.float32(2)), noise, atol=1e-4)
    edge = p.copy()
    edge[0] = 0
    below = edge.copy()
    below[0] = 1 - 1e-6
    np.testing.assert_allclose(textures._noise(edge), textures._noise(below), atol=1e-3)


def test_boxes_are_given_by_their_full_sides():
    assert box([0, 0, 0], [2, 4, 6], 0).size.tolist() == [1, 2, 3]

"""Ray casting of a scene: exact depth and normals at pixel centres, and an image as a camera would have taken it.

Rays are cast every half pixel. Those through pixel centres give depth and normals; a pixel's colour is half its
centre's and an eighth of each of its corners', so edges are antialiased in the image and sharp in the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from moe3d.data.synthetic.primitives import Primitives, intersect, local_normals
from moe3d.data.synthetic.textures import Materials, albedo

NEAR = 0.05  # metres; nothing nearer to a camera is seen
SAMPLES_AT_ONCE = 1 << 17  # bounds the memory of shading, whatever the image's size
SHADOW_MAP = 320  # rays across the shadow map
_EDGES = np.array([(i, j) for i in range(8) for j in range(i + 1, 8) if bin(i ^ j).count("1") == 1])
Array = np.ndarray


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels, looking through the image's centre."""

    rotation: Array
    """[3, 3] world-to-camera, OpenCV axes."""
    position: Array
    """[3] in the world."""
    fov: float
    """Radians across the image's longer side."""

    @staticmethod
    def look_at(position: Array, target: Array, fov: float, roll: float = 0.0) -> Camera:
        """Upright (world z is up), turned by ``roll`` radians about the viewing direction."""
        forward = (target - position) / np.linalg.norm(target - position)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        cos, sin = np.cos(roll), np.sin(roll)
        return Camera(np.stack([cos * right + sin * down, cos * down - sin * right, forward]), position, fov)

    def focal(self, size: tuple[int, int]) -> float:
        """Pixels."""
        return 0.5 * max(size) / np.tan(0.5 * self.fov)

    def intrinsics(self, size: tuple[int, int]) -> Array:
        """[3, 3]; the centre of the top-left pixel is (0, 0)."""
        height, width = size
        f = self.focal(size)
        return np.array([[f, 0, (width - 1) / 2], [0, f, (height - 1) / 2], [0, 0, 1]])

    def extrinsics(self) -> Array:
        """[3, 4] world-to-camera."""
        return np.concatenate([self.rotation, -self.rotation @ self.position[:, None]], 1)


@dataclass(frozen=True)
class Light:
    """A point light; ``camera`` looks at what it lights, for its shadow map."""

    camera: Camera
    colour: Array
    """[3] irradiance at ``reach``."""
    reach: float
    """Metres at which the light has its colour's strength."""
    shadow: bool


@dataclass(frozen=True)
class Scene:
    """Shapes, their materials, lights, and the cameras that look at them."""

    primitives: Primitives
    material: Array
    """[N] int: each primitive's row in ``materials``."""
    materials: Materials
    lights: list[Light]
    ambient: Array
    """[2, 3] light from below and from above."""
    sky: Array
    """[2, 3] colour at the horizon and at the zenith of rays that hit nothing."""
    cameras: list[Camera]


@dataclass(frozen=True)
class Sensor:
    """How a camera turns light into pixel values."""

    brightness: float
    """The image's mean linear value before its highlights roll off."""
    contrast: float
    """Exponent on linear values relative to the mean."""
    white_balance: Array
    """[3] gains."""
    blur: float
    """Pixels: sigma of the lens's Gaussian."""
    noise: float
    """Standard deviation at full scale; shot noise falls with the square root of the signal."""
    vignetting: float
    """Loss of light at the corners, 0 to 1."""


@dataclass(frozen=True)
class View:
    """What one camera sees of a scene."""

    radiance: Array
    """[H, W, 3] linear RGB."""
    depth: Array
    """[H, W] planar metres, 0 where a ray hits nothing."""
    normals: Array
    """[H, W, 3] in the camera's frame, towards the camera; 0 where a ray hits nothing."""


def trace(primitives: Primitives, camera: Camera, x: Array, y: Array) -> tuple[Array, Array]:
    """Cast the rays (x[j], y[i], 1) of the camera's frame.

    Returns:
        ``(depth, index)``: [len(y), len(x)] planar depth, inf where nothing is hit, and the primitive hit, else -1.
    """
    depth = np.full((len(y), len(x)), np.inf)
    index = np.full((len(y), len(x)), -1, np.int32)
    nearest, left, right, top, bottom = _screen_bounds(primitives, camera)
    columns = np.stack([np.searchsorted(x, left), np.searchsorted(x, right, "right")], 1)
    rows = np.stack([np.searchsorted(y, top), np.searchsorted(y, bottom, "right")], 1)
    seen = (columns[:, 0] < columns[:, 1]) & (rows[:, 0] < rows[:, 1]) & np.isfinite(nearest)
    to_local = primitives.rotation.transpose(0, 2, 1)
    origins = np.einsum("nij,nj->ni", to_local, camera.position - primitives.centre)
    axes = to_local @ camera.rotation.T
    for i in sorted(np.flatnonzero(seen), key=nearest.__getitem__):
        window = slice(*rows[i]), slice(*columns[i])
        if depth[window].max() <= nearest[i]:
            continue  # hidden behind what is nearer
        across = axes[i, :, :1] * x[window[1]]
        down = axes[i, :, 1:2] * y[window[0]] + axes[i, :, 2:]
        direction = across[:, None, :] + down[:, :, None]
        t = intersect(primitives.kind[i], origins[i], direction, primitives.size[i], primitives.cutout[i])
        nearer = t < depth[window]
        np.copyto(depth[window], t, where=nearer)
        np.copyto(index[window], i, where=nearer)
    return depth, index


def _screen_bounds(primitives: Primitives, camera: Camera) -> tuple[Array, ...]:
    """For each primitive: its smallest depth (inf when behind the camera) and its extent in (x, y) at depth 1."""
    corners = (primitives.corners() - camera.position) @ camera.rotation.T
    start, end = corners[:, _EDGES[:, 0]], corners[:, _EDGES[:, 1]]
    crosses = (start[..., 2] < NEAR) != (end[..., 2] < NEAR)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = (NEAR - start[..., 2]) / (end[..., 2] - start[..., 2])
        cut = np.where(crosses[..., None], start + at[..., None] * (end - start), np.nan)
        points = np.concatenate([np.where(corners[..., 2:] >= NEAR, corners, np.nan), cut], 1)
        projected = points[..., :2] / points[..., 2:]
    x, y = projected[..., 0], projected[..., 1]
    smallest, largest = (lambda v: np.fmin.reduce(v, 1)), (lambda v: np.fmax.reduce(v, 1))
    nearest = np.nan_to_num(smallest(points[..., 2]), nan=np.inf)
    return nearest, smallest(x), largest(x), smallest(y), largest(y)


class Renderer:
    """Renders the views of one scene; shadow maps are cast once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._shadows = [_shadow_map(scene.primitives, light) if light.shadow else None for light in scene.lights]

    def view(self, camera: Camera, size: tuple[int, int]) -> View:
        """The scene as ``camera`` sees it in an image of ``size`` = (height, width)."""
        height, width = size
        focal = camera.focal(size)
        x = (0.5 * np.arange(2 * width + 1) - 0.5 - (width - 1) / 2) / focal
        y = (0.5 * np.arange(2 * height + 1) - 0.5 - (height - 1) / 2) / focal
        radiance = np.empty((height, width, 3), np.float32)
        depth = np.empty((height, width), np.float32)
        normals = np.empty((height, width, 3), np.float32)
        band = max(1, SAMPLES_AT_ONCE // (4 * width))
        for top in range(0, height, band):
            rows = slice(top, min(top + band, height))
            y_band = y[2 * rows.start : 2 * rows.stop + 1]
            t, index = trace(self.scene.primitives, camera, x, y_band)
            depth[rows] = np.where(np.isfinite(t), t, 0)[1::2, 1::2]
            centres, normals[rows] = self._shade(camera, x[1::2], y_band[1::2], t[1::2, 1::2], index[1::2, 1::2])
            corners, _ = self._shade(camera, x[::2], y_band[::2], t[::2, ::2], index[::2, ::2])
            radiance[rows] = 0.5 * centres + 0.125 * (
                corners[:-1, :-1] + corners[:-1, 1:] + corners[1:, :-1] + corners[1:, 1:]
            )
        return View(radiance, depth, normals)

    def _shade(self, camera: Camera, x: Array, y: Array, t: Array, index: Array) -> tuple[Array, Array]:
        """Colours and camera-frame normals [rows, columns, 3] of traced rays.

        Vectors are [3, P] float32 here: NumPy is slow on arrays whose last dimension is 3.
        """
        scene, primitives = self.scene, self.scene.primitives
        turn = camera.rotation.astype(np.float32)
        rays = turn.T @ np.stack(np.broadcast_arrays(x, y[:, None], 1.0)).reshape(3, -1).astype(np.float32)
        colour, normals = _sky(rays, scene.sky), np.zeros_like(rays)
        hit = np.flatnonzero(index >= 0)
        which, depth = index.reshape(-1)[hit], t.reshape(-1)[hit].astype(np.float32)
        offset = depth * rays[:, hit]  # from the camera
        to_local = primitives.rotation.transpose(2, 1, 0)
        origin = np.einsum("ijn,nj->in", to_local, camera.position - primitives.centre).astype(np.float32)
        to_local = np.take(to_local.astype(np.float32), which, axis=2)
        local = np.take(origin, which, axis=1) + np.stack([_dot(row, offset) for row in to_local])
        local_normal = self._local_normals(which, local)
        normal = np.stack([_dot(column, local_normal) for column in to_local.transpose(1, 0, 2)])
        toward = -offset / np.sqrt(_dot(offset, offset))
        normal *= np.copysign(1 / np.sqrt(_dot(normal, normal)), _dot(normal, toward))
        normals[:, hit] = turn @ normal
        material = scene.materials[scene.material[which]]
        footprint = depth * np.float32(x[1] - x[0])
        base = albedo(material, local, local_normal, footprint)
        points = offset + camera.position.astype(np.float32)[:, None]
        colour[:, hit] = self._lit(material, base, points, normal, toward)
        return colour.T.reshape(*t.shape, 3), normals.T.reshape(*t.shape, 3)

    def _local_normals(self, which: Array, points: Array) -> Array:
        """Unnormalised outward normals [3, P] of points [3, P] on the primitives ``which`` [P], in their frames."""
        normals = np.empty_like(points)
        kinds = self.scene.primitives.kind[which]
        sizes = self.scene.primitives.size.T.astype(np.float32)
        for kind in np.unique(self.scene.primitives.kind):
            chosen = np.flatnonzero(kinds == kind)
            normals[:, chosen] = local_normals(kind, points[:, chosen], sizes[:, which[chosen]])
        return normals

    def _lit(self, material: Materials, base: Array, points: Array, normal: Array, toward: Array) -> Array:
        """Radiance [3, P] towards the camera: ambient, Lambert, and Blinn-Phong highlights."""
        below, above = self.scene.ambient.astype(np.float32)[..., None]
        light = below + (above - below) * (0.5 + 0.5 * normal[2])
        highlight = np.zeros_like(light)
        for lamp, shadow in zip(self.scene.lights, self._shadows, strict=True):
            to_lamp = lamp.camera.position.astype(np.float32)[:, None] - points
            square = _dot(to_lamp, to_lamp)
            to_lamp /= np.sqrt(square)
            reach = np.float32(lamp.reach**2)
            arriving = reach / (np.float32(0.15) * reach + np.float32(0.85) * square)
            if shadow is not None:
                arriving *= _visibility(shadow, lamp.camera, points, normal)
            cosine = np.maximum(_dot(normal, to_lamp), 0)
            half = to_lamp + toward
            shine = np.maximum(_dot(normal, half), 1e-4) / np.sqrt(_dot(half, half))
            colour = lamp.colour.astype(np.float32)[:, None]
            light += colour * (arriving * cosine)
            highlight += colour * (arriving * (cosine > 0) * material.specular * shine**material.gloss)
        return base * light + highlight


def _dot(a: Array, b: Array) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _sky(rays: Array, colours: Array) -> Array:
    """[3, P] a smooth gradient from horizon to zenith."""
    height = np.maximum(rays[2], 0) / np.sqrt(_dot(rays, rays))
    horizon, zenith = colours.astype(np.float32)[..., None]
    return horizon + (zenith - horizon) * np.sqrt(height)


def _shadow_map(primitives: Primitives, light: Light) -> Array:
    reach = np.tan(0.5 * light.camera.fov)
    line = np.linspace(-reach, reach, SHADOW_MAP)
    return trace(primitives, light.camera, line, line)[0].astype(np.float32)


def _visibility(shadow: Array, camera: Camera, points: Array, normal: Array) -> Array:
    """[P] in [0, 1]: the part of four neighbouring shadow rays that reach the point; 1 outside the map."""
    reach = np.float32(np.tan(0.5 * camera.fov))
    texel = 2 * reach / (SHADOW_MAP - 1)
    rotation = camera.rotation.astype(np.float32)
    from_lamp = points - camera.position.astype(np.float32)[:, None]
    lift = np.float32(1.5) * texel * np.abs(rotation[2] @ from_lamp) + np.float32(0.005)
    x, y, z = rotation @ (from_lamp + normal * lift)  # a shadow ray's width off the surface
    column, row = (x / z + reach) / texel, (y / z + reach) / texel
    inside = (z > NEAR) & (np.minimum(column, row) > 0) & (np.maximum(column, row) < SHADOW_MAP - 1)
    column, row = np.where(inside, column, 0), np.where(inside, row, 0)
    left, top = column.astype(np.int32), row.astype(np.int32)
    right_part, lower_part = column - left, row - top
    corner, surface, shadow = top * SHADOW_MAP + left, z - np.float32(0.01), shadow.reshape(-1)
    upper = (1 - right_part) * (shadow[corner] > surface) + right_part * (shadow[corner + 1] > surface)
    corner += SHADOW_MAP
    lower = (1 - right_part) * (shadow[corner] > surface) + right_part * (shadow[corner + 1] > surface)
    return np.where(inside, upper + lower_part * (lower - upper), 1)


def expose(radiance: Array, sensor: Sensor, rng: np.random.Generator) -> Array:
    """Radiance [H, W, 3] -> float32 sRGB in [0, 1] in steps of 1/255."""
    height, width = radiance.shape[:2]
    image = gaussian_filter(radiance, (sensor.blur, sensor.blur, 0)) if sensor.blur > 0.2 else radiance
    image = (image / image.mean()) ** np.float32(sensor.contrast)
    image = image * (sensor.brightness * sensor.white_balance / image.mean()).astype(np.float32)
    row, column = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    image = image * (1 - sensor.vignetting * (row**2 + column**2) / 2)[..., None].astype(np.float32)
    image = image / (1 + 0.2 * image**2)  # highlights roll off before they clip
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = np.clip(image + sensor.noise * grain * np.sqrt(np.maximum(image, 0) + 0.02), 0, 1)
    encoded = np.where(image <= 0.0031308, 12.92 * image, 1.055 * np.maximum(image, 1e-6) ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.float32) / np.float32(255)

"""Ray casting of a scene: exact depth and normals at pixel centres, and an image as a camera would have taken it.

Rays are cast every half pixel. Those through pixel centres give depth and normals; colour is the tent-weighted mean
(1-2-1 in both directions) of the nine rays of a pixel, so edges are antialiased in the image and sharp in the depth.
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
    """The image's mean linear value."""
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
            t, index = trace(self.scene.primitives, camera, x, y[2 * rows.start : 2 * rows.stop + 1])
            colour, normal = self._shade(camera, x, y[2 * rows.start : 2 * rows.stop + 1], t, index, 0.5 / focal)
            radiance[rows] = _tent(colour)
            depth[rows] = np.where(np.isfinite(t), t, 0)[1::2, 1::2]
            normals[rows] = normal[1::2, 1::2] @ camera.rotation.T.astype(np.float32)
        return View(radiance, depth, normals)

    def _shade(
        self, camera: Camera, x: Array, y: Array, t: Array, index: Array, spacing: float
    ) -> tuple[Array, Array]:
        """Colours and world normals [rows, columns, 3] of traced rays ``spacing`` apart at depth 1."""
        scene, primitives = self.scene, self.scene.primitives
        rays = np.stack(np.broadcast_arrays(x, y[:, None], 1.0), -1).reshape(-1, 3) @ camera.rotation
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        colour = _sky(rays, scene.sky)
        normals = np.zeros_like(colour)
        hit = np.flatnonzero(index.reshape(-1) >= 0)
        which, toward = index.reshape(-1)[hit], -rays[hit]
        planar = t.reshape(-1)[hit]
        distance = planar / (toward @ -camera.rotation[2])
        points = camera.position - distance[:, None] * toward
        rotation = primitives.rotation[which]
        local = np.einsum("nji,nj->ni", rotation, points - primitives.centre[which])
        local_normal = np.empty_like(local)
        for kind in np.unique(primitives.kind):
            chosen = np.flatnonzero(primitives.kind[which] == kind)
            local_normal[chosen] = local_normals(kind, local[chosen], primitives.size[which[chosen]])
        normal = np.einsum("nij,nj->ni", rotation, local_normal)
        facing = np.einsum("ni,ni->n", normal, toward)
        normal *= (np.copysign(1.0, facing) / np.linalg.norm(normal, axis=1))[:, None]
        normals[hit] = normal
        material = scene.materials[scene.material[which]]
        points, normal, toward, local, local_normal, planar = (
            v.astype(np.float32) for v in (points, normal, toward, local, local_normal, planar)
        )
        base = albedo(material, local, local_normal, planar * np.float32(spacing))
        colour[hit] = self._lit(material, base, points, normal, toward)
        shape = (len(y), len(x), 3)
        return colour.reshape(shape), normals.reshape(shape)

    def _lit(self, material: Materials, base: Array, points: Array, normal: Array, toward: Array) -> Array:
        """Radiance [P, 3] towards the camera: ambient, Lambert, and Blinn-Phong highlights."""
        below, above = self.scene.ambient.astype(np.float32)
        light = below + (above - below) * (0.5 + 0.5 * normal[:, 2:])
        highlight = np.zeros_like(light)
        for lamp, shadow in zip(self.scene.lights, self._shadows):
            to_lamp = lamp.camera.position.astype(np.float32) - points
            square = np.einsum("ni,ni->n", to_lamp, to_lamp)
            to_lamp /= np.sqrt(square)[:, None]
            arriving = lamp.reach**2 / (0.3 * lamp.reach**2 + 0.7 * square)
            if shadow is not None:
                arriving *= _visibility(shadow, lamp.camera, points, normal)
            cosine = np.maximum(np.einsum("ni,ni->n", normal, to_lamp), 0)
            colour = lamp.colour.astype(np.float32)
            light += (arriving * cosine)[:, None] * colour
            half = to_lamp + toward
            half /= np.linalg.norm(half, axis=1, keepdims=True)
            shine = np.maximum(np.einsum("ni,ni->n", normal, half), 1e-4) ** material.gloss
            highlight += (arriving * (cosine > 0) * shine * material.specular)[:, None] * colour
        return base * light + highlight


def _sky(rays: Array, colours: Array) -> Array:
    """[P, 3] a smooth gradient from horizon to zenith."""
    height = np.clip(rays[:, 2:], 0, 1).astype(np.float32) ** np.float32(0.6)
    horizon, zenith = colours.astype(np.float32)
    return horizon + (zenith - horizon) * height


def _shadow_map(primitives: Primitives, light: Light) -> Array:
    reach = np.tan(0.5 * light.camera.fov)
    line = np.linspace(-reach, reach, SHADOW_MAP)
    return trace(primitives, light.camera, line, line)[0].astype(np.float32)


def _visibility(shadow: Array, camera: Camera, points: Array, normal: Array) -> Array:
    """[P] in [0, 1]: the part of four neighbouring shadow rays that reach the point; 1 outside the map."""
    reach = np.tan(0.5 * camera.fov)
    texel = 2 * reach / (SHADOW_MAP - 1)
    position, rotation = camera.position.astype(np.float32), camera.rotation.astype(np.float32)
    depth = (points - position) @ rotation[2]
    lifted = points + normal * (1.5 * texel * np.abs(depth) + 0.005)[:, None]  # a shadow ray's width off the surface
    x, y, z = ((lifted - position) @ rotation.T).T
    with np.errstate(divide="ignore", invalid="ignore"):
        column, row = (x / z + reach) / texel, (y / z + reach) / texel
    inside = (z > NEAR) & (column > 0) & (row > 0) & (column < SHADOW_MAP - 1) & (row < SHADOW_MAP - 1)
    column, row = np.where(inside, column, 0), np.where(inside, row, 0)
    left, top = column.astype(np.int32), row.astype(np.int32)
    right_part, lower_part = column - left, row - top
    seen = np.zeros(len(points), np.float32)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = (right_part if dx else 1 - right_part) * (lower_part if dy else 1 - lower_part)
        seen += weight * (shadow[top + dy, left + dx] > z - 0.01)
    return np.where(inside, seen, 1)


def _tent(colour: Array) -> Array:
    """[2H+1, 2W+1, 3] half-pixel samples -> [H, W, 3]."""
    rows = 0.25 * colour[:-2:2] + 0.5 * colour[1::2] + 0.25 * colour[2::2]
    return 0.25 * rows[:, :-2:2] + 0.5 * rows[:, 1::2] + 0.25 * rows[:, 2::2]


def expose(radiance: Array, sensor: Sensor, rng: np.random.Generator) -> Array:
    """Radiance [H, W, 3] -> float32 sRGB in [0, 1] in steps of 1/255."""
    height, width = radiance.shape[:2]
    image = gaussian_filter(radiance, (sensor.blur, sensor.blur, 0)) if sensor.blur > 0.2 else radiance
    image = image * (sensor.brightness * sensor.white_balance / image.mean()).astype(np.float32)
    row, column = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    image = image * (1 - sensor.vignetting * (row**2 + column**2) / 2)[..., None].astype(np.float32)
    image = image / (1 + 0.25 * image**2)  # highlights roll off before they clip
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = np.clip(image + sensor.noise * grain * np.sqrt(np.maximum(image, 0) + 0.02), 0, 1)
    encoded = np.where(image <= 0.0031308, 12.92 * image, 1.055 * np.maximum(image, 1e-6) ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.float32) / np.float32(255)

"""Ray casting of a few shapes whose intersections with a ray are exact.

Each shape lives in its own frame, centred at the origin, with half-sizes ``size`` = (sx, sy, sz) in metres:

- ``BOX``: |x| <= sx, |y| <= sy, |z| <= sz.
- ``ELLIPSOID``: radii sx, sy, sz.
- ``FRUSTUM``: a capped cone around z with radius sx at z = -sz and sy at z = +sz; equal radii make a cylinder or a rod.
- ``TORUS``: a ring around z, sx from the axis to the tube's centre, sy the tube's radius.
- ``PANEL``: the rectangle |x| <= sx, |y| <= sy in z = 0, infinitely thin, less the holes that ``cutout`` describes.

Rays are origin + t * direction with an unnormalised direction, so t means whatever the caller made it mean; the
renderer gives directions unit z in the camera's frame, which makes t the planar depth. All arithmetic is float64:
the discriminant of a 5 mm rod seen from 10 m loses six digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BOX, ELLIPSOID, FRUSTUM, TORUS, PANEL = range(5)

# How a panel is cut out; ``cutout`` = (style, a, b, c), lengths in metres.
SOLID, DISC, RING, ROUND_HOLES, LATTICE, OPENING, SPOKES = range(7)

NEAREST_HIT = 1e-6
Array = np.ndarray


@dataclass(frozen=True)
class Primitives:
    """N shapes placed in the world, as arrays."""

    kind: Array
    """[N] int: BOX, ELLIPSOID, ..."""
    centre: Array
    """[N, 3] in the world."""
    rotation: Array
    """[N, 3, 3]: its columns are the shape's axes in the world."""
    size: Array
    """[N, 3] half-sizes, see the module."""
    cutout: Array
    """[N, 4]: a panel's cut-out, zero for the others."""

    def __len__(self) -> int:
        return len(self.kind)

    def corners(self) -> Array:
        """[N, 8, 3] the corners in the world of each shape's bounding box."""
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij"), -1).reshape(8, 3)
        local = signs * self.half_extent()[:, None]
        return local @ self.rotation.transpose(0, 2, 1) + self.centre[:, None]

    def half_extent(self) -> Array:
        """[N, 3] half-sizes of each shape's bounding box in its own frame."""
        first, second, third = self.size.T
        widest = np.maximum(first, second)
        extent = self.size.copy()
        extent[self.kind == FRUSTUM] = np.stack([widest, widest, third], 1)[self.kind == FRUSTUM]
        ring = np.stack([first + second, first + second, second], 1)
        extent[self.kind == TORUS] = ring[self.kind == TORUS]
        extent[self.kind == PANEL, 2] = 0
        return extent


def intersect(kind: int, origin: Array, direction: Array, size: Array, cutout: Array) -> Array:
    """The first hit of each ray in the shape's own frame.

    Args:
        kind: BOX, ELLIPSOID, ...
        origin: [3], common to all rays.
        direction: [3, ...].
        size: [3].
        cutout: [4], read for panels only.

    Returns:
        [...] the smallest t > 0 on the surface, inf where the ray misses.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if kind == PANEL:
            return _panel(origin, direction, size, cutout)
        return _SOLIDS[kind](origin, direction, size)


def local_normals(kind: int, points: Array, size: Array) -> Array:
    """Outward normals [3, P], not normalised, of surface points of one kind in their shapes' frames; size is [3, P]."""
    return _NORMALS[kind](points, size)


def _first_positive(*candidates: Array) -> Array:
    """The smallest candidate above zero; inf where there is none."""
    smallest = np.full_like(candidates[0], np.inf)
    for t in candidates:
        np.minimum(smallest, np.where(t > NEAREST_HIT, t, np.inf), out=smallest)
    return smallest


def _box(origin: Array, direction: Array, size: Array) -> Array:
    enter, leave = -np.inf, np.inf
    for o, d, s in zip(origin, direction, size, strict=True):
        inverse = 1 / d
        first, second = (-s - o) * inverse, (s - o) * inverse
        enter = np.maximum(enter, np.minimum(first, second))
        leave = np.minimum(leave, np.maximum(first, second))
    hit = np.where(enter > NEAREST_HIT, enter, leave)
    return np.where((enter <= leave) & (hit > NEAREST_HIT), hit, np.inf)


def _ellipsoid(origin: Array, direction: Array, size: Array) -> Array:
    ox, oy, oz = origin / size
    dx, dy, dz = (d / s for d, s in zip(direction, size, strict=True))
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    root = np.sqrt(b * b - a * (ox * ox + oy * oy + oz * oz - 1))  # nan where the ray misses
    near, far = (-b - root) / a, (-b + root) / a
    hit = np.where(near > NEAREST_HIT, near, far)
    return np.where(hit > NEAREST_HIT, hit, np.inf)


def _frustum(origin: Array, direction: Array, size: Array) -> Array:
    bottom, top, half = size
    slope, middle = (top - bottom) / (2 * half), (top + bottom) / 2
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    radius = middle + slope * oz  # of the cone at the origin's height
    a = dx * dx + dy * dy - (slope * dz) ** 2
    b = ox * dx + oy * dy - radius * slope * dz
    root = np.sqrt(b * b - a * (ox * ox + oy * oy - radius * radius))
    candidates = []
    for t in ((-b - root) / a, (-b + root) / a):
        candidates.append(np.where(np.abs(oz + t * dz) <= half, t, np.nan))
    for height, cap in ((-half, bottom), (half, top)):
        t = (height - oz) / dz
        inside = (ox + t * dx) ** 2 + (oy + t * dy) ** 2 <= cap * cap
        candidates.append(np.where(inside, t, np.nan))
    return _first_positive(*candidates)


def _torus(origin: Array, direction: Array, size: Array) -> Array:
    """Sphere tracing for most rays, roots of the quartic for those that graze the ring; Newton's method polishes both.

    Sphere tracing alone crawls along the surface, and finding the roots for all rays would take ten times as long.
    """
    ring, tube, _ = size
    bound = np.array([ring + tube, ring + tube, tube])
    origin, directions = origin[:, None], direction.reshape(3, -1)
    start = _box(origin[:, 0], directions, bound)
    ray = np.flatnonzero(np.isfinite(start))
    inside = (np.abs(origin[:, 0]) <= bound).all()  # of the box, whose far side is then no place to start
    t = np.zeros(len(ray)) if inside else start[ray]
    d = directions[:, ray]
    speed = np.sqrt((d * d).sum(0))
    end = t + 2 * np.linalg.norm(bound) / speed
    rays, times = [], []
    for _ in range(20):
        distance = _torus_distance(origin + t * d, ring, tube)
        near = distance < 1e-2 * tube
        rays.append(ray[near])
        times.append(t[near])
        t = t + distance / speed
        left = ~near & (t < end)
        ray, d, speed, t, end = ray[left], d[:, left], speed[left], t[left], end[left]
        if not len(ray):
            break
    arrived, t = np.concatenate(rays), np.concatenate(times)
    hit = np.full(directions.shape[1], np.inf)
    hit[arrived] = _torus_polish(origin, directions[:, arrived], t, ring, tube)
    ray = np.concatenate([ray, arrived[np.isinf(hit[arrived])]])
    if len(ray):
        d, begin = directions[:, ray], 0 if inside else start[ray]
        roots = _torus_roots(origin + begin * d, d, ring, tube) + begin
        hit[ray] = np.min([_torus_polish(origin, d, t, ring, tube) for t in roots], axis=0)
    return hit.reshape(direction.shape[1:])


def _torus_distance(p: Array, ring: float, tube: float) -> Array:
    across = np.sqrt(p[0] * p[0] + p[1] * p[1]) - ring
    return np.sqrt(across * across + p[2] * p[2]) - tube


def _torus_polish(origin: Array, d: Array, t: Array, ring: float, tube: float) -> Array:
    """Newton's method from close by; inf where it does not end on the surface in front of the origin."""
    for _ in range(5):
        p = origin + t * d
        inward = 1 - ring / np.sqrt(p[0] * p[0] + p[1] * p[1])
        distance = _torus_distance(p, ring, tube)
        slope = (p[0] * d[0] + p[1] * d[1]) * inward + p[2] * d[2]
        t = t - distance * (distance + tube) / slope
    on_surface = np.abs(_torus_distance(origin + t * d, ring, tube)) < 1e-9
    return np.where(on_surface & (slope < 0) & (t > NEAREST_HIT), t, np.inf)


def _torus_roots(origin: Array, d: Array, ring: float, tube: float) -> Array:
    """[4, P] the real parts of the roots t of (|p|^2 + ring^2 - tube^2)^2 = 4 ring^2 (x^2 + y^2), p = origin + t d."""
    speed = np.sqrt((d * d).sum(0))
    scale = ring + tube
    d, origin, ring, tube = d / speed, origin / scale, ring / scale, tube / scale
    along, flat = (origin * d).sum(0), (origin * d)[:2].sum(0)
    constant = (origin * origin).sum(0) + ring * ring - tube * tube
    four = 4 * ring * ring
    companion = np.zeros((d.shape[1], 4, 4))
    companion[:, 1:, :3] = np.eye(3)
    companion[:, 0, 0] = -4 * along
    companion[:, 0, 1] = four * (d[:2] * d[:2]).sum(0) - 4 * along * along - 2 * constant
    companion[:, 0, 2] = 2 * four * flat - 4 * along * constant
    companion[:, 0, 3] = four * (origin[:2] * origin[:2]).sum(0) - constant * constant
    return np.linalg.eigvals(companion).real.T * scale / speed


def _panel(origin: Array, direction: Array, size: Array, cutout: Array) -> Array:
    t = -origin[2] / direction[2]
    x, y = origin[0] + t * direction[0], origin[1] + t * direction[1]
    solid = (np.abs(x) <= size[0]) & (np.abs(y) <= size[1]) & (t > NEAREST_HIT)
    style = int(cutout[0])
    if style != SOLID:
        solid &= _CUTOUTS[style](x, y, size, *cutout[1:])
    return np.where(solid, t, np.inf)


def _disc(x: Array, y: Array, size: Array, *_: float) -> Array:
    return (x / size[0]) ** 2 + (y / size[1]) ** 2 <= 1


def _ring(x: Array, y: Array, size: Array, inner: float, *_: float) -> Array:
    """``inner``: the hole's radius as a fraction of the panel's."""
    square = (x / size[0]) ** 2 + (y / size[1]) ** 2
    return (square <= 1) & (square >= inner * inner)


def _round_holes(x: Array, y: Array, size: Array, pitch: float, radius: float, _: float) -> Array:
    dx, dy = x - pitch * np.round(x / pitch), y - pitch * np.round(y / pitch)
    return dx * dx + dy * dy >= radius * radius


def _lattice(x: Array, y: Array, size: Array, pitch_x: float, pitch_y: float, bar: float) -> Array:
    """Bars of width ``bar``: vertical ones every ``pitch_x``, horizontal ones every ``pitch_y``."""
    across, along = np.abs(x - pitch_x * np.round(x / pitch_x)), np.abs(y - pitch_y * np.round(y / pitch_y))
    return np.minimum(across, along) <= bar / 2


def _opening(x: Array, y: Array, size: Array, centre: float, width: float, height: float) -> Array:
    """A doorway: from the panel's lower edge (-y) up by ``height``, ``width`` wide, at x = ``centre``."""
    return (np.abs(x - centre) > width / 2) | (y > height - size[1])


def _spokes(x: Array, y: Array, size: Array, count: float, width: float, twist: float) -> Array:
    """``count`` radial bars, bent by ``twist`` radians on their way from a hub to a rim."""
    radius = np.hypot(x, y) / size[0]
    turn = (np.arctan2(y, x) + twist * radius) * count / (2 * np.pi)
    bar = np.abs(turn - np.round(turn)) * 2 * np.pi / count * radius * size[0] <= width / 2
    return (radius <= 1) & (bar | (radius < 0.2) | (radius > 0.92))


def _box_normals(points: Array, size: Array) -> Array:
    ratio = points / size
    reach = np.abs(ratio)
    return np.where(reach == reach.max(0), np.sign(ratio), 0)


def _frustum_normals(points: Array, size: Array) -> Array:
    bottom, top, half = size
    slope = (top - bottom) / (2 * half)
    x, y, z = points
    rho = np.sqrt(x * x + y * y)
    to_side = np.abs(rho - (bottom + top) / 2 - slope * z)
    cap = half - np.abs(z) < to_side
    return np.where(cap, [0 * z, 0 * z, z], [x, y, -slope * rho])


def _torus_normals(points: Array, size: Array) -> Array:
    x, y, z = points
    inward = 1 - size[0] / np.sqrt(x * x + y * y)
    return np.stack([x * inward, y * inward, z])


def _panel_normals(points: Array, size: Array) -> Array:
    return np.stack([0 * points[0], 0 * points[1], 0 * points[2] + 1])


_SOLIDS: dict[int, Callable[..., Array]] = {BOX: _box, ELLIPSOID: _ellipsoid, FRUSTUM: _frustum, TORUS: _torus}
_CUTOUTS: dict[int, Callable[..., Array]] = {
    DISC: _disc,
    RING: _ring,
    ROUND_HOLES: _round_holes,
    LATTICE: _lattice,
    OPENING: _opening,
    SPOKES: _spokes,
}
_NORMALS: dict[int, Callable[[Array, Array], Array]] = {
    BOX: _box_normals,
    ELLIPSOID: lambda points, size: points / size**2,
    FRUSTUM: _frustum_normals,
    TORUS: _torus_normals,
    PANEL: _panel_normals,
}

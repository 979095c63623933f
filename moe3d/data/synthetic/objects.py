"""Things that stand in scenes: each composed of primitives, in metres, z up, standing on z = 0 around the origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from moe3d.data.synthetic import primitives as shapes
from moe3d.data.synthetic import textures
from moe3d.data.synthetic.primitives import Primitives
from moe3d.data.synthetic.textures import Materials

Array = np.ndarray
Point = Iterable[float]


@dataclass(frozen=True)
class Part:
    """One primitive of an object, in the object's frame."""

    kind: int
    centre: Array
    rotation: Array
    size: Array
    material: int
    cutout: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)


@dataclass
class Palette:
    """Draws materials at random and remembers them."""

    rng: np.random.Generator
    rows: list[tuple] = field(default_factory=list)

    def colour(self, saturation: float | None = None) -> Array:
        """Linear RGB: mostly muted, sometimes strong, from nearly black to nearly white."""
        rng = self.rng
        hue = rng.uniform(0, 1) if rng.random() < 0.5 else rng.normal(0.08, 0.06)  # wood, skin and rust are common
        saturation = rng.beta(1, 2.2) if saturation is None else saturation
        wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        value = np.exp(rng.uniform(np.log(0.03), np.log(0.85)))
        return value * (1 - saturation * (1 - wheel))

    def new(
        self,
        pattern: int | None = None,
        scale: float | None = None,
        first: Array | None = None,
        second: Array | None = None,
        specular: float | None = None,
    ) -> int:
        """The index of a new material; what is not given is drawn."""
        rng = self.rng
        if pattern is None:
            pattern = rng.choice(9, p=[0.42, 0.03, 0.06, 0.18, 0.03, 0.1, 0.08, 0.03, 0.07])
        first = self.colour() if first is None else first
        if second is None:
            second = self.colour() if rng.random() < 0.4 else first * rng.uniform(0.3, 1.6)
        if scale is None:
            scale = np.exp(rng.uniform(np.log(0.04), np.log(0.4)))
        if specular is None:
            specular = rng.choice([0.0, 0.08, 0.4], p=[0.5, 0.3, 0.2])
        gloss = np.exp(rng.uniform(np.log(8), np.log(150)))
        dirt = rng.uniform(0.05, 0.6)
        self.rows.append((pattern, first, second, scale, dirt, specular, gloss, rng.integers(1 << 20)))
        return len(self.rows) - 1

    def metal(self) -> int:
        """Steel, chrome, painted tube."""
        grey = self.rng.uniform(0.05, 0.5) * self.rng.uniform(0.92, 1.08, 3)
        return self.new(textures.PLAIN, first=grey, specular=self.rng.uniform(0.2, 0.9))

    def wood(self) -> int:
        """Boards from pale to dark."""
        tone = np.array([0.45, 0.24, 0.1]) * np.exp(self.rng.uniform(-1.3, 0.5)) * self.rng.uniform(0.85, 1.15, 3)
        return self.new(textures.PLANKS, self.rng.uniform(0.06, 0.25), tone, tone * self.rng.uniform(0.2, 0.6))

    def rubber(self) -> int:
        """Nearly black."""
        return self.new(textures.PLAIN, first=np.full(3, self.rng.uniform(0.008, 0.05)), specular=0.05)

    def table(self) -> Materials:
        """All materials drawn so far."""
        columns = [np.array(column).T for column in zip(*self.rows, strict=True)]
        kinds = (np.int64, np.float32, np.float32, np.float32, np.float32, np.float32, np.float32, np.int64)
        return Materials(*(column.astype(kind) for column, kind in zip(columns, kinds, strict=True)))


def assemble(parts: list[Part]) -> Primitives:
    """The parts as arrays for the renderer."""
    return Primitives(
        kind=np.array([part.kind for part in parts]),
        centre=np.stack([part.centre for part in parts]),
        rotation=np.stack([part.rotation for part in parts]),
        size=np.stack([part.size for part in parts]),
        cutout=np.array([part.cutout for part in parts]),
    )


def place(parts: list[Part], position: Point, yaw: float = 0.0, scale: float = 1.0, tilt: float = 0.0) -> list[Part]:
    """The object scaled, tilted about its x axis, turned by ``yaw`` about z, and moved to ``position``."""
    turn = rotation_z(yaw) @ rotation_x(tilt)
    position = np.asarray(position, float)
    return [
        replace(
            part,
            centre=turn @ part.centre * scale + position,
            rotation=turn @ part.rotation,
            size=part.size * scale,
            cutout=_scaled_cutout(part.cutout, scale),
        )
        for part in parts
    ]


def _scaled_cutout(cutout: tuple[float, ...], scale: float) -> tuple[float, ...]:
    style, a, b, c = cutout
    if style in (shapes.ROUND_HOLES, shapes.LATTICE, shapes.OPENING):
        return style, a * scale, b * scale, c * scale
    return (style, a, b * scale, c) if style == shapes.SPOKES else cutout


def rotation_x(angle: float) -> Array:
    """[3, 3] right-handed rotation about x."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def rotation_z(angle: float) -> Array:
    """[3, 3] right-handed rotation about z."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])


def frame(axis: Array) -> Array:
    """[3, 3] a right-handed frame whose z is ``axis``, with y as upright as it can be."""
    z = axis / np.linalg.norm(axis)
    x = np.array([-z[1], z[0], 0.0] if abs(z[2]) < 0.99 else [z[2], 0.0, -z[0]])  # across z and the upright
    x /= np.linalg.norm(x)
    y = np.array([z[1] * x[2] - z[2] * x[1], z[2] * x[0] - z[0] * x[2], z[0] * x[1] - z[1] * x[0]])
    return np.stack([x, y, z], 1)  # spelled out, because np.cross takes most of a scene's drawing time


def box(centre: Point, full_size: Point, material: int, yaw: float = 0.0) -> Part:
    """A box by its full side lengths."""
    return Part(shapes.BOX, np.array(centre, float), rotation_z(yaw), 0.5 * np.array(full_size, float), material)


def rod(start: Point, end: Point, radius: float, material: int, end_radius: float | None = None) -> Part:
    """A cylinder, or a capped cone, from ``start`` to ``end``."""
    start, end = np.array(start, float), np.array(end, float)
    size = np.array([radius, radius if end_radius is None else end_radius, 0.5 * np.linalg.norm(end - start)])
    return Part(shapes.FRUSTUM, 0.5 * (start + end), frame(end - start), size, material)


def ball(centre: Point, radii: Point, material: int, rotation: Array | None = None) -> Part:
    """An ellipsoid."""
    rotation = np.eye(3) if rotation is None else rotation
    return Part(shapes.ELLIPSOID, np.array(centre, float), rotation, np.array(radii, float), material)


def ring(centre: Point, axis: Point, radius: float, tube: float, material: int) -> Part:
    """A torus around ``axis``."""
    size = np.array([radius, tube, tube])
    return Part(shapes.TORUS, np.array(centre, float), frame(np.array(axis, float)), size, material)


def panel(centre: Point, axis: Point, width: float, height: float, material: int, cutout: tuple = (0, 0, 0, 0)) -> Part:
    """An infinitely thin rectangle facing ``axis``, ``height`` as upright as it can be."""
    size = np.array([0.5 * width, 0.5 * height, 0.0])
    return Part(shapes.PANEL, np.array(centre, float), frame(np.array(axis, float)), size, material, tuple(cutout))


def _from(point: Array, x: float, y: float, z: float) -> Array:
    return point + np.array([x, y, z])


def crates(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A stack of boxes, each a little turned."""
    parts, height = [], 0.0
    for _ in range(rng.integers(1, 5)):
        size = rng.uniform([0.2, 0.2, 0.12], [0.6, 0.5, 0.45])
        shift = rng.uniform(-0.06, 0.06, 2)
        parts.append(box([*shift, height + size[2] / 2], size, palette.new(), rng.normal(0, 0.25)))
        height += size[2]
    return parts


def table(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A table or work bench with things on it."""
    width, depth, height = rng.uniform([0.6, 0.4, 0.4], [1.8, 0.8, 0.95])
    top = palette.wood() if rng.random() < 0.5 else palette.new()
    legs = palette.metal() if rng.random() < 0.5 else top
    thick = rng.uniform(0.02, 0.06)
    parts = [box([0, 0, height - thick / 2], [width, depth, thick], top)]
    radius = rng.uniform(0.012, 0.035)
    for x in (-1, 1):
        for y in (-1, 1):
            foot = np.array([x * (width / 2 - 0.05), y * (depth / 2 - 0.05)])
            parts.append(rod([*foot, 0], [*foot, height - thick], radius, legs))
    if rng.random() < 0.5:
        parts.append(box([0, 0, height * 0.3], [width - 0.1, depth - 0.1, 0.02], top))
    return parts + _row_of_things(rng, palette, width * 0.85, depth, height)


def chair(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Four legs, a seat, and a back of slats."""
    width, height = rng.uniform(0.36, 0.5), rng.uniform(0.4, 0.7)
    seat, legs = palette.new(), palette.metal() if rng.random() < 0.5 else palette.wood()
    parts = [box([0, 0, height], [width, width, 0.05], seat)]
    half, radius = width / 2 - 0.02, rng.uniform(0.01, 0.022)
    for x in (-half, half):
        parts.append(rod([x, -half, 0], [x, -half, height], radius, legs))
        parts.append(rod([x * 1.1, half * 1.1, 0], [x, half, height * 2], radius, legs))
    for level in np.linspace(1.35, 1.9, rng.integers(1, 5)):
        parts.append(box([0, half, height * level], [width, 0.02, rng.uniform(0.03, 0.12)], seat))
    return parts


def bench(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A garden bench of slats, its back with crossed bars."""
    width, wood = rng.uniform(1.1, 1.8), palette.wood()
    parts = [box([0, y, 0.42], [width, 0.07, 0.03], wood) for y in (-0.2, -0.1, 0, 0.1, 0.2)]
    for x in (-width / 2, width / 2):
        parts += [box([x, -0.22, 0.3], [0.06, 0.06, 0.6], wood), box([x, 0.24, 0.45], [0.06, 0.06, 0.9], wood)]
        parts.append(box([x, 0, 0.62], [0.06, 0.52, 0.04], wood))
    parts += [box([0, 0.24, z], [width, 0.04, 0.06], wood) for z in (0.52, 0.88)]
    for x in np.linspace(-width / 2, width / 2, rng.integers(4, 14))[1:-1]:
        lean = rng.choice([0.0, 0.12])
        parts.append(rod([x - lean, 0.24, 0.52], [x + lean, 0.24, 0.88], 0.012, wood))
    return parts


def shelf(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A rack with uprights and boards, full of boxes, cans, books and gaps."""
    width, depth, height = rng.uniform([0.8, 0.3, 1.1], [2.2, 0.6, 2.3])
    frame_material = palette.metal() if rng.random() < 0.6 else palette.wood()
    board = palette.wood() if rng.random() < 0.6 else frame_material
    parts = []
    for x in (-width / 2, width / 2):
        for y in (-depth / 2, depth / 2):
            parts.append(box([x, y, height / 2], [0.045, 0.035, height], frame_material))
    if rng.random() < 0.3:
        parts.append(panel([0, depth / 2, height / 2], [0, -1, 0], width, height, palette.new()))
    levels = np.linspace(rng.uniform(0.05, 0.4), height - 0.03, rng.integers(3, 6))
    for level in levels:
        parts.append(box([0, 0, level], [width, depth, 0.03], board))
        if rng.random() < 0.85:
            room = np.diff(levels).min() - 0.05
            parts += _row_of_things(rng, palette, width * 0.92, depth, level + 0.015, room)
    return parts


def _row_of_things(
    rng: np.random.Generator, palette: Palette, width: float, depth: float, height: float, room: float = 0.45
) -> list[Part]:
    """Small things side by side on a surface at ``height``, none taller than ``room``."""
    parts: list[Part] = []
    x = -width / 2
    while True:
        w = np.exp(rng.uniform(np.log(0.05), np.log(0.45)))
        if x + w > width / 2:
            return parts
        tall = min(room, rng.uniform(0.05, 0.45))
        y, kind, middle = rng.uniform(-0.25, 0.15) * depth, rng.random(), x + w / 2
        material = palette.new()
        if kind < 0.5:
            deep = min(depth * 0.8, rng.uniform(0.08, 0.4))
            parts.append(box([middle, y, height + tall / 2], [w * 0.92, deep, tall], material, rng.normal(0, 0.1)))
        elif kind < 0.75:
            radius = min(0.46 * w, 0.12)
            top = radius * rng.uniform(0.5, 1.1)
            parts.append(rod([middle, y, height], [middle, y, height + tall], radius, material, top))
            parts.append(rod([middle, y, height + tall], [middle, y, height + tall * 1.1], top * 0.5, palette.new()))
        elif kind < 0.85:
            radius = min(0.46 * w, tall / 2, 0.2)
            parts.append(ball([middle, y, height + radius], [radius] * 3, material))
        x += w * rng.uniform(1.0, 1.3)


def cabinet(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A box with drawers, handles, and things on top."""
    width, depth, height = rng.uniform([0.4, 0.35, 0.5], [1.4, 0.6, 2.0])
    body, front, knob = palette.new(), palette.new(), palette.metal()
    parts = [box([0, 0, height / 2], [width, depth, height], body)]
    edges = np.linspace(0.05, height - 0.03, rng.integers(2, 6))
    for low, high in pairwise(edges):
        middle = (low + high) / 2
        parts.append(box([0, -depth / 2, middle], [width * 0.94, 0.03, (high - low) * 0.92], front))
        y = -depth / 2 - 0.04
        parts.append(rod([-0.07, y, middle], [0.07, y, middle], 0.008, knob))
    return parts + _row_of_things(rng, palette, width * 0.9, depth, height)


def wheel(rng: np.random.Generator, palette: Palette, radius: float | None = None) -> list[Part]:
    """A wheel standing on its tyre, axle along y: wire spokes, cast spokes or a plate with holes."""
    radius = rng.uniform(0.18, 0.38) if radius is None else radius
    tube = radius * rng.uniform(0.06, 0.22)
    tyre, metal = palette.rubber(), palette.metal()
    centre, axle = np.array([0, 0, radius]), np.array([0, 1.0, 0])
    rim = radius - 1.6 * tube
    parts = [
        ring(centre, axle, radius - tube, tube, tyre),
        ring(centre, axle, rim, 0.35 * tube, metal),
        rod(centre - 0.06 * axle, centre + 0.06 * axle, 0.14 * radius, metal),
    ]
    style = rng.random()
    if style < 0.4:
        for k in range(count := rng.integers(10, 25)):
            angle = 2 * np.pi * k / count
            outward = np.array([np.cos(angle), 0, np.sin(angle)])
            side = 0.05 * (-1) ** k * axle
            parts.append(rod(centre + side + 0.12 * radius * outward, centre + rim * outward, 0.0025, metal))
    elif style < 0.75:
        count, width = rng.integers(3, 10), radius * rng.uniform(0.05, 0.16)
        spokes = (shapes.SPOKES, count, width, rng.choice([0.0, 0.6, -0.6]))
        parts.append(panel(centre, axle, 2 * rim, 2 * rim, metal, spokes))
        disc = (shapes.RING, rng.uniform(0.4, 0.75), 0, 0)
        parts.append(panel(centre - 0.05 * axle, axle, radius, radius, palette.metal(), disc))
    else:
        parts.append(panel(centre, axle, 2 * rim, 2 * rim, metal, (shapes.DISC, 0, 0, 0)))
    return parts


def two_wheeler(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Bicycle to motorcycle: two wheels, a frame of tubes, fork, bars, saddle, and sometimes an engine and a tank."""
    radius, base = rng.uniform(0.27, 0.36), rng.uniform(0.95, 1.45)
    paint, metal, seat = palette.new(textures.PLAIN, specular=0.3), palette.metal(), palette.rubber()
    tube = rng.uniform(0.012, 0.03)
    rear, front = np.array([-base / 2, 0, radius]), np.array([base / 2, 0, radius])
    steer = rng.normal(0, 0.25)
    parts = place(wheel(rng, palette, radius), [rear[0], 0, 0])
    parts += place(wheel(rng, palette, radius), [front[0], 0, 0], steer)
    head = np.array([base / 2 - rng.uniform(0.18, 0.4), 0, rng.uniform(0.8, 0.98)])
    crank = np.array([rng.uniform(-0.1, 0.1), 0, radius * rng.uniform(0.8, 1.1)])
    saddle = np.array([-base * rng.uniform(0.15, 0.3), 0, rng.uniform(0.68, 0.95)])
    for start, end in ((head, crank), (crank, saddle), (saddle, head)):
        parts.append(rod(start, end, tube, paint))
    for side in (-0.07, 0.07):
        offset = np.array([0, side, 0])
        parts.append(rod(rear + offset, crank, tube * 0.7, metal))
        parts.append(rod(rear + offset, saddle, tube * 0.7, metal))
        parts.append(rod(front + offset, head + offset, tube, metal))
    bar = _from(head, -0.03, 0, 0.12)
    for side in (-1, 1):
        grip = _from(bar, -0.12, 0.33 * side, 0.04)
        parts += [rod(bar, grip, 0.012, metal), rod(grip, _from(grip, -0.1, 0.05 * side, -0.02), 0.018, seat)]
        mirror = _from(grip, 0.05, 0, 0.16)
        parts += [rod(grip, mirror, 0.005, metal), ball(mirror, [0.012, 0.06, 0.04], seat)]
    parts.append(ball(_from(saddle, -0.08, 0, 0.06), [rng.uniform(0.13, 0.4), 0.09, 0.05], seat))
    for hub, angle in ((rear, rng.uniform(0.5, 1.2)), (front, rng.uniform(1.2, 1.9))):
        guard = hub + 1.06 * radius * np.array([np.cos(angle), 0, np.sin(angle)])
        parts.append(box(guard, [0.3, 0.1, 0.012], paint))
    if rng.random() < 0.6:
        parts += _engine(rng, palette, crank, saddle, head, paint)
    return place(parts, [0, 0, 0], tilt=rng.normal(0, 0.08))


def _engine(
    rng: np.random.Generator, palette: Palette, crank: Array, saddle: Array, head: Array, paint: int
) -> list[Part]:
    metal, chrome = palette.metal(), palette.metal()
    tank = 0.45 * saddle + 0.55 * head + [0, 0, 0.02]
    parts = [
        ball(tank, [0.28, 0.14, 0.13], paint, frame(np.cross(head - saddle, [0, 0, 1.0])) @ rotation_x(-np.pi / 2)),
        ball(_from(head, 0.18, 0, -0.04), [0.08, 0.1, 0.1], chrome),
        box(_from(crank, 0, 0, 0.08), [0.4, 0.24, 0.24], metal),
        rod(_from(crank, 0.02, -0.17, 0.06), _from(crank, 0.02, 0.17, 0.06), 0.12, chrome),
    ]
    for k in range(rng.integers(4, 9)):  # cooling fins
        parts.append(box(_from(crank, 0.1 + 0.006 * k, 0, 0.22 + 0.028 * k), [0.2, 0.24, 0.014], metal))
    for side in (-0.14, 0.14):
        knee = _from(crank, 0.3, side, -0.1)
        parts.append(rod(_from(crank, 0.22, side, 0.2), knee, 0.02, chrome))
        parts.append(rod(knee, _from(crank, -0.75, side * 1.2, -0.02), 0.022, chrome, 0.045))
    return parts


def ladder(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Leaning, with rungs."""
    height, width, material = rng.uniform(1.2, 2.6), rng.uniform(0.3, 0.5), palette.metal()
    parts = [rod([x, 0, 0], [x, 0, height], 0.022, material) for x in (-width / 2, width / 2)]
    for level in np.arange(0.25, height - 0.1, 0.28):
        parts.append(rod([-width / 2, 0, level], [width / 2, 0, level], 0.014, material))
    return place(parts, [0, 0, 0], tilt=-rng.uniform(0.05, 0.35))


def fence(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Rails with upright bars, or posts with wire mesh."""
    width, height = rng.uniform(1.0, 3.0), rng.uniform(0.6, 1.6)
    material = palette.metal() if rng.random() < 0.5 else palette.wood()
    radius = np.exp(rng.uniform(np.log(0.006), np.log(0.03)))
    parts = [rod([x, 0, 0], [x, 0, height], max(radius, 0.02), material) for x in (-width / 2, 0, width / 2)]
    parts += [rod([-width / 2, 0, z], [width / 2, 0, z], radius, material) for z in (0.12, height - 0.05)]
    if rng.random() < 0.5:
        pitch = np.exp(rng.uniform(np.log(0.04), np.log(0.15)))
        mesh = (shapes.LATTICE, pitch, pitch * rng.choice([1.0, 2.0, 50.0]), pitch * rng.uniform(0.08, 0.35))
        parts.append(panel([0, 0, height / 2], [0, -1, 0], width, height * 0.9, material, mesh))
    else:
        for x in np.linspace(-width / 2, width / 2, rng.integers(6, 22)):
            parts.append(rod([x, 0, 0.1], [x, 0, height], radius, material))
    return parts


def perforated_plate(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A sheet with holes on two feet."""
    width, height = rng.uniform([0.4, 0.4], [1.2, 1.4])
    pitch = np.exp(rng.uniform(np.log(0.05), np.log(0.3)))
    holes = (shapes.ROUND_HOLES, pitch, pitch * rng.uniform(0.2, 0.42), 0)
    if rng.random() < 0.4:
        holes = (shapes.LATTICE, pitch, pitch * rng.uniform(0.5, 2), pitch * rng.uniform(0.2, 0.5))
    metal = palette.metal()
    feet = [rod([x, 0, 0], [x, 0, height + 0.05], 0.015, metal) for x in (-width / 2, width / 2)]
    return [*feet, panel([0, 0, 0.1 + height / 2], [0, -1, 0], width, height, palette.new(), holes)]


def pipes(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A run of pipes with right-angled bends."""
    material, radius = palette.metal(), rng.uniform(0.012, 0.06)
    at, parts = np.array([0, 0, rng.uniform(0.05, 0.3)]), []
    for _ in range(rng.integers(3, 9)):
        axis = rng.choice(3, p=[0.4, 0.15, 0.45])
        step = np.zeros(3)
        step[axis] = rng.uniform(0.2, 0.8) * rng.choice([-1, 1])
        if not 0.02 < at[2] + step[2] < 2.2:
            step = -step
        parts += [rod(at, at + step, radius, material), ball(at + step, [1.25 * radius] * 3, material)]
        at = at + step
    return parts


def plant(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A pot with thin stems and flat leaves."""
    green = np.array([0.08, 0.22, 0.05]) * np.exp(rng.uniform(-0.7, 0.7)) * rng.uniform(0.6, 1.4, 3)
    leaf, stem = palette.new(textures.CLOUDS, 0.1, green), palette.new(textures.PLAIN, first=green * 0.6)
    height = rng.uniform(0.3, 1.1)
    parts = [rod([0, 0, 0], [0, 0, 0.25], 0.1, palette.new(), 0.15)]
    for _ in range(rng.integers(6, 16)):
        end = np.array([*rng.normal(0, 0.22, 2), 0.3 + height * rng.uniform(0.3, 1)])
        parts.append(rod([0, 0, 0.22], end, 0.007, stem, 0.003))
        radii = rng.uniform([0.04, 0.02, 0.003], [0.14, 0.07, 0.006])
        parts.append(ball(end, radii, leaf, rotation_z(rng.uniform(0, 6.3)) @ rotation_x(rng.normal(0, 0.7))))
    return parts


def barrel(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A drum, bin, bucket or gas bottle."""
    radius, height, body = rng.uniform(0.1, 0.35), rng.uniform(0.25, 1.1), palette.new()
    top = radius * rng.choice([1.0, 1.0, 0.7, 1.3])
    parts = [rod([0, 0, 0], [0, 0, height], radius, body, top)]
    if rng.random() < 0.6:
        rim = palette.metal()
        for level in rng.choice([[0.05, 0.5, 0.97], [0.33, 0.66, 0.98]]):
            parts.append(ring([0, 0, level * height], [0, 0, 1], radius + (top - radius) * level, 0.012, rim))
    if rng.random() < 0.3:
        parts.append(ball([0, 0, height], [top, top, top * 0.7], body))
    return parts


def lamp(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A foot, a thin pole and a shade."""
    height, metal = rng.uniform(0.5, 1.9), palette.metal()
    shade = rng.uniform(0.08, 0.25)
    return [
        rod([0, 0, 0], [0, 0, 0.03], 0.14, metal),
        rod([0, 0, 0], [0, 0, height], rng.uniform(0.006, 0.018), metal),
        rod([0, 0, height], [0, 0, height + 0.25], shade, palette.new(), shade * rng.uniform(0.4, 1)),
    ]


def tyres(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A pile of rings lying flat."""
    material, parts, height = palette.rubber(), [], 0.0
    for _ in range(rng.integers(1, 5)):
        tube = rng.uniform(0.05, 0.1)
        shift = rng.normal(0, 0.03, 2)
        parts.append(ring([*shift, height + tube], [0, 0, 1], rng.uniform(0.2, 0.3), tube, material))
        height += 2 * tube
    return parts


def tools(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Brooms, boards and poles leaning together."""
    parts = []
    for _ in range(rng.integers(2, 8)):
        length, x = rng.uniform(0.8, 2.1), rng.uniform(-0.5, 0.5)
        foot, top = [x, -rng.uniform(0.1, 0.5), 0], [x + rng.normal(0, 0.15), 0.1, length]
        if rng.random() < 0.7:
            parts.append(rod(foot, top, rng.uniform(0.008, 0.025), palette.wood()))
            parts.append(box(foot, rng.uniform(0.05, 0.25, 3), palette.new()))
        else:
            board = box([x, 0, length / 2], [rng.uniform(0.08, 0.4), 0.03, length], palette.wood())
            parts += place([board], [0, 0, 0], tilt=-rng.uniform(0.03, 0.2))
    return parts


def tripod(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Three legs and a head: easel, stand, stool."""
    height, spread, metal = rng.uniform(0.4, 1.5), rng.uniform(0.15, 0.4), palette.metal()
    parts = []
    for k in range(3):
        angle = 2 * np.pi * k / 3
        parts.append(rod([spread * np.cos(angle), spread * np.sin(angle), 0], [0, 0, height], 0.014, metal))
    if rng.random() < 0.5:
        return [*parts, rod([0, 0, height], [0, 0, height + 0.05], 0.18, palette.new())]
    return [*parts, box([0, 0, height], rng.uniform(0.08, 0.3, 3), palette.new())]


def heap(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """Shapes of all kinds thrown together."""
    parts, spread = [], rng.uniform(0.15, 0.5)
    for _ in range(rng.integers(5, 16)):
        centre = np.array([*rng.normal(0, spread, 2), abs(rng.normal(0, spread))])
        axis, material = rng.normal(0, 1, 3), palette.new()
        size = np.exp(rng.uniform(np.log(0.03), np.log(0.25), 3))
        kind = int(rng.integers(5))
        if kind == shapes.FRUSTUM:
            parts.append(rod(centre, centre + axis * size[0] * 3, size[1] * 0.6, material, size[2] * 0.6))
        elif kind == shapes.TORUS:
            parts.append(ring(centre, axis, size[0], size[0] * rng.uniform(0.1, 0.4), material))
        elif kind == shapes.PANEL:
            parts.append(panel(centre, axis, 2 * size[0], 2 * size[1], material))
        else:
            parts.append(Part(kind, centre, frame(axis), size, material))
    return parts


def cables(rng: np.random.Generator, palette: Palette) -> list[Part]:
    """A cable that hangs between two points, in short straight pieces."""
    material, radius = palette.rubber(), rng.uniform(0.003, 0.01)
    width, high, sag = rng.uniform(0.5, 2.0), rng.uniform(1.2, 2.2), rng.uniform(0.1, 0.6)
    x = np.linspace(-width / 2, width / 2, 13)
    z = high + sag * ((2 * x / width) ** 2 - 1) + 0.2 * x
    points = np.stack([x, 0 * x, z], 1)
    return [rod(start, end, radius, material) for start, end in pairwise(points)]


Maker = Callable[[np.random.Generator, Palette], list[Part]]

# Name, how often, and the radius of the floor it needs.
FURNITURE: list[tuple[Maker, float, float]] = [
    (crates, 3, 0.35), (table, 2, 0.7), (chair, 1.5, 0.35), (bench, 1, 0.8), (cabinet, 0.7, 0.6), (wheel, 1.5, 0.3),
    (two_wheeler, 2, 0.9), (ladder, 1, 0.4), (fence, 1, 0.9), (perforated_plate, 1, 0.5), (pipes, 1, 0.5),
    (plant, 1, 0.35), (barrel, 2, 0.35), (lamp, 1, 0.25), (tyres, 1, 0.3), (tripod, 1, 0.35), (heap, 2, 0.5),
]  # fmt: skip
ALONG_WALLS: list[tuple[Maker, float, float]] = [
    (shelf, 4, 0.8), (cabinet, 2, 0.6), (bench, 1, 0.8), (tools, 2, 0.6), (ladder, 1, 0.4), (crates, 1.5, 0.4),
    (pipes, 1, 0.5), (table, 1, 0.7), (cables, 1, 0.1),
]  # fmt: skip

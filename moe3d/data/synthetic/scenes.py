"""Draws a scene: a room, a yard or a table top, things in it, lights, and cameras that look at its middle."""

from __future__ import annotations

import numpy as np

from moe3d.data.synthetic import primitives as shapes
from moe3d.data.synthetic import textures
from moe3d.data.synthetic.objects import (
    ALONG_WALLS,
    FURNITURE,
    Maker,
    Palette,
    Part,
    assemble,
    ball,
    box,
    panel,
    place,
    rod,
)
from moe3d.data.synthetic.render import Camera, Light, Scene

MAX_VIEWS = 8
CLEARANCE = 0.3  # metres that a camera keeps from things
SURFACES = [textures.PLAIN, textures.PLANKS, textures.BRICKS, textures.CLOUDS, textures.TILES]  # of walls
Array = np.ndarray
# What stays however near a camera comes (floors, walls), what is left out then, the lights, and the ambient light.
Setting = tuple[list[Part], list[Part], list[Light], Array]


def draw_scene(rng: np.random.Generator) -> Scene:
    """One scene with ``MAX_VIEWS`` cameras. The world: z up, metres, the cameras look at about the origin from -y."""
    palette = Palette(rng)
    setting = rng.choice(["room", "yard", "table"], p=[0.76, 0.14, 0.1])
    cameras, distance = _draw_cameras(rng, setting)
    if setting == "room":
        stage, things, lights, ambient = _room(rng, palette, cameras, distance)
    elif setting == "yard":
        stage, things, lights, ambient = _yard(rng, palette, distance)
    else:
        stage, things, lights, ambient = _table_top(rng, palette, distance)
    parts = stage + _clear_of_cameras(things, cameras)
    sky_top = np.array([0.25, 0.45, 0.9]) * rng.uniform(0.5, 1.3) + rng.uniform(0, 0.4)
    return Scene(
        primitives=assemble(parts),
        material=np.array([part.material for part in parts]),
        materials=palette.table(),
        lights=lights,
        ambient=ambient,
        sky=np.stack([rng.uniform(0.8, 1.3) + 0 * sky_top, sky_top]),
        cameras=cameras,
    )


def _draw_cameras(rng: np.random.Generator, setting: str) -> tuple[list[Camera], float]:
    """Cameras around a first one, and the first one's distance to what it looks at.

    A wide lens stands nearer, so that the middle of the scene fills the picture.
    """
    fov = np.radians(38 + 38 * rng.beta(1.0, 1.5))
    if setting == "table":
        distance, height = rng.uniform(0.6, 1.3), rng.uniform(0.2, 0.8)
        target = np.array([0, 0, rng.uniform(0.0, 0.15)])
    else:
        distance = np.clip(np.exp(rng.normal(np.log(2.7), 0.4)) * 0.45 / np.tan(fov / 2), 1.3, 6.0)
        height = rng.uniform(0.5, 1.9)
        target = np.array([0, 0, rng.uniform(0.3, 1.1)])
    azimuth = rng.uniform(-0.6, 0.6)
    first = np.array([distance * np.sin(azimuth), -distance * np.cos(azimuth), height])
    spread = distance * np.exp(rng.uniform(np.log(0.04), np.log(0.3)))
    jitter = 0.05 * distance
    cameras = []
    for k in range(MAX_VIEWS):
        move = rng.normal(0, spread, 3) * [1, 0.6, 0.4] if k else np.zeros(3)
        position = first + move
        position[2] = max(position[2], 0.15)
        aim = target + rng.normal(0, jitter, 3)
        cameras.append(Camera.look_at(position, aim, fov * np.exp(rng.normal(0, 0.03)), rng.normal(0, 0.03)))
    return cameras, distance


def _clear_of_cameras(parts: list[Part], cameras: list[Camera]) -> list[Part]:
    """Leave out what a camera would touch."""
    built = assemble(parts)
    extent = built.half_extent()
    keep = np.ones(len(parts), bool)
    for camera in cameras:
        local = np.einsum("nji,nj->ni", built.rotation, camera.position - built.centre)
        gap = np.linalg.norm(np.maximum(np.abs(local) - extent, 0), axis=1)
        keep &= gap > CLEARANCE
    return [part for part, kept in zip(parts, keep, strict=True) if kept]


def _pick(rng: np.random.Generator, makers: list[tuple[Maker, float, float]]) -> tuple[Maker, float]:
    weights = np.array([weight for _, weight, _ in makers])
    maker, _, radius = makers[rng.choice(len(makers), p=weights / weights.sum())]
    return maker, radius


class _Floor:
    """Remembers which discs of the floor are taken."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.taken: list[tuple[Array, float]] = []

    def find(self, radius: float, low: Array, high: Array, tries: int = 20) -> Array | None:
        """A place for a disc within the rectangle that touches no other, if one is found."""
        for _ in range(tries):
            place_at = self.rng.uniform(low, high)
            if all(np.linalg.norm(place_at - other) > 0.6 * (radius + r) for other, r in self.taken):
                self.taken.append((place_at, radius))
                return place_at
        return None


def _furnish(
    rng: np.random.Generator, palette: Palette, floor: _Floor, count: int, low: Array, high: Array
) -> list[Part]:
    parts = []
    for _ in range(count):
        maker, radius = _pick(rng, FURNITURE)
        scale = rng.uniform(0.8, 1.15)
        at = floor.find(radius * scale, low, high)
        if at is not None:
            parts += place(maker(rng, palette), [*at, 0], rng.uniform(-np.pi, np.pi), scale)
    return parts


def _room(rng: np.random.Generator, palette: Palette, cameras: list[Camera], distance: float) -> Setting:
    positions = np.stack([camera.position for camera in cameras])
    margin = rng.uniform(0.5, 1.5)
    left = min(positions[:, 0].min() - margin, -rng.uniform(1.5, 4.5))
    right = max(positions[:, 0].max() + margin, rng.uniform(1.5, 4.5))
    front, back = positions[:, 1].min() - margin, rng.uniform(0.8, 4.5)
    height = max(rng.uniform(2.2, 3.6), positions[:, 2].max() + 0.4)
    extent = (left, right, front, back, height)
    stage = _shell(rng, palette, extent)
    floor = _Floor(rng)
    parts = _wall_decoration(rng, palette, extent)
    parts += _hero(rng, palette, floor)
    parts += _against_walls(rng, palette, floor, extent)
    low = np.array([max(left + 0.4, -0.9 * distance), -0.45 * distance])
    high = np.array([min(right - 0.4, 0.9 * distance), back - 0.5])
    parts += _furnish(rng, palette, floor, int(rng.integers(3, 16)), low, np.maximum(high, low + 0.1))
    if rng.random() < 0.25:
        parts += _occluder(rng, palette, positions[0])
    return stage, parts, _room_lights(rng, extent), _ambient(rng, 0.35)


def _shell(rng: np.random.Generator, palette: Palette, extent: tuple[float, ...]) -> list[Part]:
    """Floor, ceiling and four walls; sometimes a doorway in the back wall leads into another room."""
    left, right, front, back, height = extent
    width, length = right - left, back - front
    middle = np.array([(left + right) / 2, (front + back) / 2])
    floor_pattern = rng.choice([textures.CLOUDS, textures.PLANKS, textures.TILES, textures.SPECKLE, textures.PLAIN])
    scale = {textures.TILES: rng.uniform(0.15, 0.6), textures.PLANKS: rng.uniform(0.08, 0.2)}.get(floor_pattern, 0.5)
    ground = palette.new(floor_pattern, scale, specular=rng.choice([0.0, 0.05, 0.15]))
    wall = palette.new(rng.choice(SURFACES), rng.uniform(0.15, 0.35), specular=0.0)
    ceiling = palette.new(textures.PLAIN, first=np.full(3, rng.uniform(0.3, 0.85)))
    beyond = palette.new(rng.choice(SURFACES), 0.5, specular=0.0)
    depth = rng.uniform(0.6, 4)
    parts = [
        panel([*middle, 0], [0, 0, 1], width + 12, length + 12, ground),
        panel([*middle, height], [0, 0, -1], width + 12, length + 12, ceiling),
        panel([left, middle[1], height / 2], [1, 0, 0], length, height, wall),
        panel([right, middle[1], height / 2], [-1, 0, 0], length, height, wall),
        panel([middle[0], front, height / 2], [0, 1, 0], width, height, wall),
        panel([middle[0], back + depth, height / 2], [0, -1, 0], width + 12, height, beyond),
    ]
    doorway = (shapes.SOLID, 0.0, 0.0, 0.0)
    if rng.random() < 0.35:
        doorway = (shapes.OPENING, rng.uniform(-0.35, 0.35) * width, rng.uniform(0.8, 1.8), rng.uniform(1.9, 2.15))
    parts.append(panel([middle[0], back, height / 2], [0, -1, 0], width, height, wall, doorway))
    return parts


def _wall_decoration(rng: np.random.Generator, palette: Palette, extent: tuple[float, ...]) -> list[Part]:
    """Posters, frames, battens and pipes on the back wall; beams and pipes under the ceiling."""
    left, right, front, back, height = extent
    parts = []
    for _ in range(rng.integers(0, 5)):
        size = rng.uniform([0.2, 0.2], [1.2, 0.9])
        at = [rng.uniform(left, right), back - 0.02, rng.uniform(0.9, height - 0.4)]
        parts.append(box(at, [size[0], 0.03, size[1]], palette.new()))
    if rng.random() < 0.35:
        batten = palette.wood()
        for x in np.arange(left + rng.uniform(0, 0.6), right, rng.uniform(0.4, 0.9)):
            parts.append(box([x, back - 0.04, height / 2], [0.05, 0.09, height], batten))
    if rng.random() < 0.3:
        pipe, radius = palette.metal(), rng.uniform(0.02, 0.06)
        z = rng.uniform(0.2, height - 0.2)
        parts.append(rod([left, back - 0.1, z], [right, back - 0.1, z], radius, pipe))
    if rng.random() < 0.3:
        beam = palette.wood()
        for y in np.arange(front + 0.5, back, rng.uniform(0.8, 1.6)):
            parts.append(box([(left + right) / 2, y, height - 0.08], [right - left, 0.1, 0.16], beam))
    return parts


def _hero(rng: np.random.Generator, palette: Palette, floor: _Floor) -> list[Part]:
    """One to three things in the middle of the picture."""
    parts = []
    for _ in range(rng.integers(1, 4)):
        maker, radius = _pick(rng, FURNITURE)
        at = floor.find(radius, np.array([-0.7, -0.5]), np.array([0.7, 0.6]))
        if at is not None:
            parts += place(maker(rng, palette), [*at, 0], rng.normal(0, 0.8) + np.pi * rng.integers(2))
    return parts


def _against_walls(rng: np.random.Generator, palette: Palette, floor: _Floor, extent: tuple[float, ...]) -> list[Part]:
    left, right, _, back, _ = extent
    parts = []
    for _ in range(rng.integers(2, 9)):
        maker, radius = _pick(rng, ALONG_WALLS)
        gap = 0.35
        side = rng.choice(3, p=[0.7, 0.15, 0.15])
        if side == 0:
            low, high, yaw = [max(left, -3.5) + 0.5, back - gap], [min(right, 3.5) - 0.5, back - gap], 0.0
        else:
            x, yaw = ((left + gap, np.pi / 2), (right - gap, -np.pi / 2))[side - 1]
            low, high = [x, min(0.0, back - 0.6)], [x, back - 0.5]
        at = floor.find(radius, np.array(low), np.array(high))
        if at is not None:
            parts += place(maker(rng, palette), [*at, 0], yaw + rng.normal(0, 0.03))
    return parts


def _occluder(rng: np.random.Generator, palette: Palette, camera: Array) -> list[Part]:
    """Something thin between the first camera and the scene."""
    at = camera * rng.uniform(0.45, 0.7) + [rng.normal(0, 0.35), 0, 0]
    if rng.random() < 0.6:
        radius = rng.uniform(0.01, 0.06)
        return [rod([at[0], at[1], 0], [at[0] + rng.normal(0, 0.1), at[1], 2.2], radius, palette.new())]
    mesh = (shapes.LATTICE, rng.uniform(0.08, 0.3), rng.uniform(0.08, 0.6), rng.uniform(0.006, 0.02))
    return [panel([at[0], at[1], 0.5], [rng.normal(0, 0.3), -1, 0], rng.uniform(0.5, 2), 1.0, palette.metal(), mesh)]


def _room_lights(rng: np.random.Generator, extent: tuple[float, ...]) -> list[Light]:
    left, right, front, back, height = extent
    lights = []
    for k in range(rng.integers(1, 4)):
        at = np.array([rng.uniform(0.7 * left, 0.7 * right), rng.uniform(0.8 * front, 0.5 * back), height - 0.15])
        at[2] *= rng.uniform(0.75, 1)
        camera = Camera.look_at(at, np.array([*rng.normal(0, 0.3, 2), 0.2]), np.radians(125))
        strength = rng.uniform(0.5, 1.2) if k == 0 else rng.uniform(0.1, 0.5)
        lights.append(Light(camera, strength * _tint(rng), float(np.linalg.norm(at)), shadow=k == 0))
    return lights


def _tint(rng: np.random.Generator) -> Array:
    """White light between tungsten and daylight."""
    warmth = rng.normal(0.08, 0.12)
    return np.array([1 + warmth, 1, 1 - 1.4 * warmth]).clip(0.4, 1.6)


def _ambient(rng: np.random.Generator, strength: float) -> Array:
    above = strength * rng.uniform(0.2, 1.2) * _tint(rng)
    return np.stack([above * rng.uniform(0.3, 0.8), above])


def _yard(rng: np.random.Generator, palette: Palette, distance: float) -> Setting:
    """Ground within a wall or hedge, houses and trees, sky above, the sun far away."""
    pattern = rng.choice([textures.CLOUDS, textures.SPECKLE, textures.TILES, textures.BRICKS])
    far = rng.uniform(10, 24)
    stage = [panel([0, 0, 0], [0, 0, 1], 2 * far, 2 * far, palette.new(pattern, rng.uniform(0.2, 0.8), specular=0.0))]
    hedge = palette.new(rng.choice([*SURFACES, textures.SPECKLE]), rng.uniform(0.2, 0.6), specular=0.0)
    for axis in ([-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0]):
        stage.append(panel([-far * axis[0], -far * axis[1], 1], axis, 2 * far, rng.uniform(3, 8), hedge))
    floor = _Floor(rng)
    parts = _hero(rng, palette, floor)
    for _ in range(rng.integers(6, 12)):
        angle = rng.uniform(-1.2, 1.2)
        at = rng.uniform(4, 14) * np.array([np.sin(angle), np.cos(angle)])
        if rng.random() < 0.6:
            size = rng.uniform([1, 0.3, 1.0], [7, 4, 5])
            masonry = rng.choice([textures.BRICKS, textures.PLANKS, textures.PLAIN, textures.CLOUDS])
            parts.append(box([*at, size[2] / 2], size, palette.new(masonry, rng.uniform(0.2, 0.6)), -angle))
        else:
            parts += place(_tree(rng, palette), [*at, 0])
    low, high = np.array([-distance, -0.45 * distance]), np.array([distance, 4.0])
    parts += _furnish(rng, palette, floor, int(rng.integers(4, 14)), low, high)
    sun = rng.normal(0, 1, 3) * [1, 1, 0] + [0, -0.5, 1.2]
    camera = Camera.look_at(40 * sun / np.linalg.norm(sun), np.zeros(3), np.radians(18))
    lights = [Light(camera, rng.uniform(0.3, 1.5) * _tint(rng), 40.0, shadow=True)]
    return stage, parts, lights, _ambient(rng, 0.5)


def _tree(rng: np.random.Generator, palette: Palette) -> list[Part]:
    green = np.array([0.07, 0.16, 0.04]) * np.exp(rng.uniform(-0.7, 0.7)) * rng.uniform(0.7, 1.3, 3)
    leaves, height = palette.new(textures.SPECKLE, 0.4, green, green * 0.4), rng.uniform(1.2, 3)
    parts = [rod([0, 0, 0], [0, 0, height], 0.12, palette.wood(), 0.07)]
    for _ in range(rng.integers(4, 10)):
        centre = np.array([*rng.normal(0, 0.5, 2), height + rng.uniform(-0.2, 1.2)])
        parts.append(ball(centre, rng.uniform(0.3, 0.8, 3), leaves))
    return parts


def _table_top(rng: np.random.Generator, palette: Palette, distance: float) -> Setting:
    """Small things on a table, a wall or a dim room behind it."""
    top = palette.wood() if rng.random() < 0.5 else palette.new()
    back = rng.uniform(0.6, 3.5)
    stage = [
        box([0, rng.uniform(-0.1, 0.3), -0.02], [rng.uniform(1.0, 2.4), rng.uniform(0.8, 1.4), 0.04], top),
        panel([0, 0, -0.75], [0, 0, 1], 12, 12, palette.new(textures.PLANKS)),
        panel([0, back, 0.5], [0, -1, 0], 14, 5, palette.new(rng.choice(SURFACES), 0.3, specular=0.0)),
    ]
    floor, parts = _Floor(rng), []
    for _ in range(rng.integers(6, 18)):
        maker, radius = _pick(rng, FURNITURE)
        scale = rng.uniform(0.12, 0.3)
        at = floor.find(radius * scale, np.array([-0.5, -0.3 * distance]), np.array([0.5, 0.5]))
        if at is not None:
            parts += place(maker(rng, palette), [*at, 0], rng.uniform(-np.pi, np.pi), scale)
    for _ in range(rng.integers(2, 7)):
        maker, _ = _pick(rng, ALONG_WALLS)
        parts += place(maker(rng, palette), [rng.uniform(-2.5, 2.5), back - 0.4, -0.75])
    at = np.array([rng.uniform(-1.2, 1.2), rng.uniform(-1.5, 0.3), rng.uniform(0.9, 1.6)])
    camera = Camera.look_at(at, np.zeros(3), np.radians(120))
    lights = [Light(camera, rng.uniform(0.5, 1.2) * _tint(rng), float(np.linalg.norm(at)), shadow=True)]
    return stage, parts, lights, _ambient(rng, 0.4)

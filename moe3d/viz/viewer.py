"""The viewer: a reconstruction in the browser, its points coloured by what the mixture of experts knows about them."""

from __future__ import annotations

import contextlib
import functools
import io
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe3d.data import Dataset
from moe3d.evaluation import Frame, fit_alignment, resize_nearest
from moe3d.geometry import invert_extrinsics, matrix_to_quaternion
from moe3d.reconstruct.frames import FrameFolder, ReconstructedFrame
from moe3d.viz.colors import INVALID, expert_colors
from moe3d.viz.pictures import depth_picture, depth_range, entropy_picture, error_picture

LOOPBACK = "127.0.0.1"
COLORS = ("RGB", "depth", "expert", "entropy", "error")
HEADS = ("MoE", "stock")
_THUMBNAIL = 160  # pixels, of the photographs in the frusta


@dataclass(frozen=True)
class ViewSettings:
    """What the panel of controls says."""

    color: str = "RGB"
    """One of ``COLORS``."""
    head: str = "MoE"
    """One of ``HEADS``: whose depth."""
    conf_percentile: float = 25.0
    """Points of less confidence than this many per cent of all are hidden."""
    max_entropy: float = np.inf
    """Points of a higher entropy, in nats, are hidden."""
    experts: frozenset[int] | None = None
    """Points of other experts (the most probable one counts) are hidden; None shows all."""


class FrameCloud:
    """One frame's points with everything that the viewer may ask of them.

    Args:
        frame: the frame.
        keep: [H, W] bool, the pixels that are held at all.
        near_far: depths of the two ends of the depth's colours.
        truth: [H, W] true depth in any unit, 0 where unknown, for the errors.
    """

    def __init__(
        self,
        frame: ReconstructedFrame,
        keep: np.ndarray,
        near_far: tuple[float, float],
        truth: np.ndarray | None = None,
    ) -> None:
        depths = {"MoE": frame.depth, "stock": frame.depth if frame.stock_depth is None else frame.stock_depth}
        keep = keep & np.logical_and.reduce([np.isfinite(depth) & (depth > 0) for depth in depths.values()])
        self.points = {head: frame.unprojected(depth)[keep] for head, depth in depths.items()}
        self.confidence = frame.confidence[keep]
        self.entropy = None if frame.entropy is None else frame.entropy[keep].astype(np.float32)
        self.expert = None if frame.weights is None else frame.weights.argmax(axis=0)[keep]
        self._colors = {"RGB": dict.fromkeys(HEADS, frame.image[keep])}
        self._colors["depth"] = {head: depth_picture(depth, *near_far)[keep] for head, depth in depths.items()}
        if frame.weights is not None and frame.entropy is not None:
            experts = expert_colors(len(frame.weights))[self.expert]  # of the most probable one, as the boxes choose
            entropy = entropy_picture(frame.entropy.astype(np.float32), len(frame.weights))[keep]
            self._colors |= {"expert": dict.fromkeys(HEADS, experts), "entropy": dict.fromkeys(HEADS, entropy)}
        if truth is not None:
            self._colors["error"] = {head: _errors(depth, truth)[keep] for head, depth in depths.items()}

    def visible(self, settings: ViewSettings, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Points [N, 3] and colours [N, 3] uint8 of what is shown, ``threshold`` being the least confidence."""
        shown = self.confidence >= threshold
        if self.entropy is not None:
            shown &= self.entropy <= settings.max_entropy
        if self.expert is not None and settings.experts is not None:
            shown &= np.isin(self.expert, list(settings.experts))
        return self.points[settings.head][shown], self._colors[settings.color][settings.head][shown]

    @property
    def colors(self) -> list[str]:
        """Those of ``COLORS`` that there are."""
        return [name for name in COLORS if name in self._colors]


class SceneClouds:
    """A reconstruction's frames as the viewer shows them.

    Args:
        frames: of one scene.
        max_points: how many pixels of all frames together are held, spread evenly.
        truth: true depths by frame name, as :func:`true_depths` gives them.
    """

    def __init__(self, frames: FrameFolder, max_points: int, truth: Mapping[str, np.ndarray] | None = None) -> None:
        first = frames[0]
        near_far = depth_range(first.depth, np.isfinite(first.depth) & (first.depth > 0))
        random = np.random.default_rng(0)
        part = min(max_points / (len(frames) * first.depth.size), 1.0)
        self.names, self.cameras, self.clouds = frames.names, [], []
        for name, frame in zip(frames.names, frames, strict=True):
            known = None if truth is None else truth.get(name, np.zeros((1, 1)))
            keep = random.random(frame.depth.shape) < part
            self.clouds.append(FrameCloud(frame, keep, near_far, known))
            self.cameras.append(Camera.of(frame))
        self.num_experts = 0 if first.weights is None else len(first.weights)
        self.colors = self.clouds[0].colors
        self.middle_depth = float(np.median(first.depth[first.depth > 0]))
        self.spacing = self.middle_depth / float(first.intrinsics[1, 1]) / part**0.5
        """The distance of two neighbouring points in the middle of the scene."""

    @functools.cached_property
    def _confidences(self) -> np.ndarray:
        return np.sort(np.concatenate([cloud.confidence for cloud in self.clouds]))

    def visible(self, settings: ViewSettings) -> list[tuple[np.ndarray, np.ndarray]]:
        """Points and colours of each frame."""
        at = int(settings.conf_percentile / 100 * max(len(self._confidences) - 1, 0))
        threshold = self._confidences[at] if len(self._confidences) else 0.0
        return [cloud.visible(settings, threshold) for cloud in self.clouds]


@dataclass(frozen=True)
class Camera:
    """A frame's camera as viser wants it."""

    fov: float
    """Vertical field of view in radians."""
    aspect: float
    """Width by height of the image plane, for pixels that need not be square."""
    wxyz: np.ndarray
    """[4] camera-to-world rotation."""
    position: np.ndarray
    """[3] in the world."""
    image: np.ndarray
    """[h, w, 3] uint8, small."""

    @classmethod
    def of(cls, frame: ReconstructedFrame) -> Camera:
        height, width = frame.depth.shape
        fx, fy = frame.intrinsics[0, 0], frame.intrinsics[1, 1]
        to_world = invert_extrinsics(torch.from_numpy(frame.extrinsics))
        step = max(-(-max(height, width) // _THUMBNAIL), 1)
        return cls(
            fov=float(2 * np.arctan(height / 2 / fy)),
            aspect=float((width / fx) / (height / fy)),
            wxyz=np.roll(matrix_to_quaternion(to_world[:, :3]).numpy(), 1),
            position=to_world[:, 3].numpy(),
            image=frame.image[::step, ::step],
        )


def true_depths(dataset: Dataset, sequence: str, frames: Sequence[str]) -> dict[str, np.ndarray]:
    """The ground truth's depth [H, W] of the frames that a dataset has, 0 where it is unknown.

    Raises:
        ValueError: the dataset has no such sequence, or none of the frames.
    """
    known = [name for name in frames if name in dataset.sequences.get(sequence, [])]
    if not known:
        raise ValueError(
            f"the dataset has no ground truth for the scene '{sequence}': neither is its frame '{frames[0]}'"
        )
    sample = dataset.load(sequence, known)
    depths = torch.where(sample.valid, sample.depth, 0).numpy()
    return dict(zip(known, depths, strict=True))


def _errors(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The picture of a frame's errors after median alignment, on the prediction's own grid."""
    truth = resize_nearest(truth, depth.shape)
    frame = Frame(depth, truth, truth > 0)
    if not frame.kept.any():
        return np.broadcast_to(INVALID, (*depth.shape, 3))
    scale = fit_alignment(depth[frame.kept], truth[frame.kept], "median").scale
    return error_picture(depth * scale, np.where(frame.kept, truth, 1.0), frame.kept)


class Viewer:
    """A viser server that shows scenes until :meth:`stop`.

    Args:
        scenes: at least one, by name.
        host: the address to answer on; anything but the loopback lets others on the network look.
        port: to answer on; where it is taken, the next free one.

    Raises:
        RuntimeError: viser is not installed.
        OSError: ``host`` is no address of this machine.
    """

    def __init__(self, scenes: Mapping[str, SceneClouds], host: str = LOOPBACK, port: int = 8080) -> None:
        try:
            import viser
        except ImportError:
            raise RuntimeError("the viewer needs viser: pip install 'moe3d[view]'") from None
        self._scenes = scenes
        _check_host(host)
        with contextlib.redirect_stdout(io.StringIO()):  # a banner, even when it is told to be quiet
            self.server = viser.ViserServer(host=host, port=port, label="moe3d", verbose=False)
        self.server.gui.configure_theme(show_logo=False, show_share_button=False, dark_mode=True)
        self.server.scene.set_up_direction("-y")
        self._panel()
        self._show_scene()

    @property
    def url(self) -> str:
        return f"http://{self.server.get_host()}:{self.server.get_port()}"

    def stop(self) -> None:
        self.server.stop()

    def _panel(self) -> None:
        gui = self.server.gui
        first = next(iter(self._scenes.values()))
        experts = max(scene.num_experts for scene in self._scenes.values())
        self._scene = gui.add_dropdown("Scene", list(self._scenes), visible=len(self._scenes) > 1)
        self._color = gui.add_dropdown("Colour", first.colors)
        self._head = gui.add_dropdown("Depth of", HEADS, hint="the MoE head, or the stock head it was made from")
        self._confidence = gui.add_slider("Hide least confident %", 0, 100, 1, 25)
        self._size = gui.add_slider("Point size", 0.1, 5.0, 0.1, 1.5)
        self._cameras = gui.add_checkbox("Cameras", True)
        highest = float(np.log(max(experts, 2)))
        self._entropy = gui.add_slider("Entropy at most", 0.0, round(highest, 2), 0.01, round(highest, 2))
        with gui.add_folder("Experts", visible=experts > 0):
            gui.add_html(_legend(experts))
            self._experts = [gui.add_checkbox(f"Expert {i + 1}", True) for i in range(experts)]
        self._count = gui.add_markdown("")
        controls: tuple[Any, ...] = (self._color, self._head, self._confidence, self._entropy, *self._experts)
        for control in controls:
            control.on_update(lambda _: self._show_points())
        self._size.on_update(lambda _: self._resize_points())
        self._cameras.on_update(lambda _: self._show_cameras())
        self._scene.on_update(lambda _: self._show_scene())

    def _show_scene(self) -> None:
        """Everything of the chosen scene, in place of what was there."""
        self.server.scene.reset()
        scene = self._current
        mixture = scene.num_experts > 0
        self._color.options = scene.colors
        for control in (self._head, self._entropy, *self._experts):
            control.disabled = not mixture
        self._frusta = [self._add_frustum(index, camera) for index, camera in enumerate(scene.cameras)]
        nothing = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
        self._handles = [
            self.server.scene.add_point_cloud(
                f"/points/{index:06d}", *nothing, precision="float32", point_shape="circle"
            )
            for index in range(len(scene.clouds))
        ]
        self._look_from_the_first_camera(scene)
        self._resize_points()
        self._show_points()
        self._show_cameras()

    @property
    def _current(self) -> SceneClouds:
        return self._scenes[self._scene.value]

    def settings(self) -> ViewSettings:
        """What the controls say now."""
        return ViewSettings(
            color=self._color.value,
            head=self._head.value,
            conf_percentile=self._confidence.value,
            max_entropy=np.inf if self._entropy.value >= self._entropy.max else self._entropy.value,
            experts=frozenset(i for i, box in enumerate(self._experts) if box.value) if self._experts else None,
        )

    def _show_points(self) -> None:
        visible = self._current.visible(self.settings())
        with self.server.atomic():
            for handle, (points, colors) in zip(self._handles, visible, strict=True):
                handle.visible = len(points) > 0
                if handle.visible:  # the browser would go on showing the points before no points
                    handle.points, handle.colors = points, colors
        self._count.content = f"{sum(len(points) for points, _ in visible):,} points"

    def _resize_points(self) -> None:
        scene = self._current
        for handle in self._handles:
            handle.point_size = float(scene.spacing * self._size.value)

    def _show_cameras(self) -> None:
        for frustum in self._frusta:
            frustum.visible = self._cameras.value

    def _add_frustum(self, index: int, camera: Camera) -> Any:
        return self.server.scene.add_camera_frustum(
            f"/cameras/{index:06d}",
            fov=camera.fov,
            aspect=camera.aspect,
            scale=0.05 * self._current.middle_depth,
            thickness=2,
            thickness_units="screen",
            color=(250, 170, 60),
            image=camera.image,
            wxyz=camera.wxyz,
            position=camera.position,
        )

    def _look_from_the_first_camera(self, scene: SceneClouds) -> None:
        """From a little behind it, above it and beside it, so that it is seen itself."""
        far = scene.middle_depth
        self.server.initial_camera.position = (0.25 * far, -0.2 * far, -0.25 * far)
        self.server.initial_camera.look_at = (0.0, 0.0, far)


def _legend(experts: int) -> str:
    """A square of each expert's colour."""
    square = '<span style="color: rgb({}, {}, {})">&#9632; {}</span>'
    squares = (square.format(*color, number) for number, color in enumerate(expert_colors(experts), start=1))
    return f'<div style="padding: 0 0.75em; font-size: 0.9em">{" ".join(squares)}</div>'


def _check_host(host: str) -> None:
    """OSError for what is no address of this machine, for which viser would wait forever."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        raise type(error)(
            error.errno, f"--host must be an address of this machine, got '{host}' ({error.strerror})"
        ) from None

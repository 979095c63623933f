"""Depth Anything 3 (Lin et al., arXiv 2511.10647) with VGGT's interface: every command takes it as it takes VGGT.

Its package, ``depth-anything-3``, makes the network; what is here renames, and turns its cameras round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.geometry import quaternion_product, quaternion_to_matrix
from moe3d.integrations.da3 import PatchedDA3Head
from moe3d.models.mini import check_images

INPUT_WIDTH = 504  # of its own API
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of DINOv2's inputs
_NAMES = {384: "da3-small", 768: "da3-base", 1024: "da3-large", 1536: "da3-giant"}  # by the width of the backbone
_LEAST_FOV = 2e-6  # radians: the network itself takes no less, in half the angle's tangent
_WIDTH_OF = "model.backbone.pretrained.cls_token"  # [1, 1, width]
_NESTED = "model.da3."
_CAMERAS = "model.cam_dec."
_SPLATS = ("gs_head", "gs_adapter")  # of the giant network, which makes Gaussians with them; nobody calls them here


class DepthAnything3(nn.Module):
    """A ``DepthAnything3Net`` with VGGT's attributes, calls and outputs; :func:`moe3d.patch` gives it experts.

    The network is the only submodule, and has the name that Depth Anything 3's own API gives it, so that state dicts
    are those of its files. ``aggregator``, ``camera_head`` and ``depth_head`` are views of its parts.

    Args:
        network: one that predicts cameras, as all but the metric and the monocular networks do.

    Raises:
        ValueError: another one.
    """

    shows_images = True  # to its head, as Depth Anything 3's own networks do not
    aggregator: Aggregator
    camera_head: CameraHead
    depth_head: DepthHead

    def __init__(self, network: Any) -> None:
        super().__init__()
        missing = [part for part in ("backbone", "head", "cam_dec") if getattr(network, part, None) is None]
        if missing:
            raise ValueError(
                f"network must be a DepthAnything3Net that predicts cameras, got {type(network).__name__} without "
                f"{', '.join(missing)}"
            )
        self.model = network

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "model":  # past nn.Module, which would register every part a second time
            self.__dict__["aggregator"] = Aggregator(value.backbone)
            self.__dict__["camera_head"] = CameraHead(value.cam_dec)
            self.__dict__["depth_head"] = DepthHead(value.head)

    def train(self, mode: bool = True) -> DepthAnything3:
        """As of any module; the views go along."""
        for view in (self.aggregator, self.camera_head, self.depth_head):
            view.training = mode
        return super().train(mode)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Reconstruct a sequence of frames.

        Args:
            images: [S, 3, H, W] or [B, S, 3, H, W] in [0, 1], H and W multiples of 14.

        Returns:
            ``pose_enc`` [B, S, 9], VGGT's encoding of the world-to-camera motion, and ``pose_enc_list``, of which it is
            the only one; ``depth`` [B, S, H, W, 1], planar, and ``depth_conf`` [B, S, H, W]; of a patched head
            ``depth_entropy`` [B, S, H, W] and with ``return_experts`` ``depth_weights`` and ``depth_hypotheses``
            [B, S, K, H, W]; in eval mode ``images`` [B, S, 3, H, W]. Lengths are in one unknown unit per sequence;
            the first frame's camera is the world.

        Raises:
            ValueError: ``images`` has another shape.
            TypeError: ``images`` is not floating point.
        """
        images = check_images(images)
        tokens, start = self.aggregator(images)
        with torch.autocast(images.device.type, enabled=False):
            tokens = [layer.float() for layer in tokens]
            poses = self.camera_head(tokens)
            maps = self.depth_head.predict(tokens, images, start)
        predictions = {**maps, "depth": maps["depth"][..., None], "pose_enc": poses[-1], "pose_enc_list": poses}
        return predictions if self.training else predictions | {"images": images}


class Aggregator(nn.Module):
    """Images to tokens, as VGGT's aggregator gives them: the camera's first, then those of the patches."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def frame_blocks(self) -> nn.ModuleList:
        """All blocks; every other one of the later ones is global."""
        return self.backbone.pretrained.blocks

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        """[B, S, 3, H, W] in [0, 1] to four tensors [B, S, 1 + P, dim], and the 1."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        layers, _ = self.backbone((images - mean) / std, cam_token=None, export_feat_layers=[])
        return [torch.cat([camera[:, :, None], patches], dim=2) for patches, camera in layers], 1


class CameraHead(nn.Module):
    """The camera decoder, whose motions are camera-to-world, in the world of a frame that the network chooses."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, aggregated_tokens_list: Sequence[Tensor]) -> list[Tensor]:
        """One pose encoding [B, S, 9] (see :func:`moe3d.geometry.encode_pose`) in a list, as VGGT gives its own: the
        motions are world-to-camera, and the first frame's camera is the world."""
        pose = self.decoder(aggregated_tokens_list[-1][:, :, 0])
        position, rotation, fov = pose.split([3, 4, 2], dim=-1)
        back = F.normalize(rotation, dim=-1) * rotation.new_tensor([-1, -1, -1, 1])
        fov = fov.clamp_min(_LEAST_FOV)
        translation = quaternion_to_matrix(back) @ (position[:, :1] - position)[..., None]
        relative = quaternion_product(back, F.normalize(rotation[:, :1], dim=-1))
        relative = torch.where(relative[..., 3:] < 0, -relative, relative)
        return [torch.cat([translation[..., 0], relative, fov], dim=-1)]


class DepthHead(nn.Module):
    """The depth head, stock or patched, called as VGGT's is."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head
        self._extras: dict[str, Tensor] | None = None

    @property
    def scratch(self) -> Any:
        return self.head.scratch

    @property
    def intermediate_layer_idx(self) -> Sequence[int]:
        return self.head.intermediate_layer_idx

    @property
    def tail(self) -> Any:
        """A patched head's :class:`~moe3d.nn.MoEHead`; None of a stock one."""
        return self.head.tail if isinstance(self.head, PatchedDA3Head) else None

    def predict(
        self, tokens: Sequence[Tensor | None], images: Tensor, patch_start_idx: int, frames_chunk_size: int | None = 8
    ) -> dict[str, Tensor]:
        """The head's maps of depth by their own names, each [B, S, ...]; its rays are left out."""
        layers = [(layer,) for layer in tokens]
        shown = {"images": images} if self.tail is not None and self.tail.sees_image else {}
        maps = self.head(layers, *images.shape[-2:], patch_start_idx, chunk_size=frames_chunk_size, **shown)
        return {name: value for name, value in maps.items() if name.startswith("depth")}

    def forward(
        self,
        aggregated_tokens_list: Sequence[Tensor | None],
        images: Tensor,
        patch_start_idx: int,
        frames_chunk_size: int | None = 8,
    ) -> tuple[Tensor, Tensor]:
        """(depth [B, S, H, W, 1], confidence [B, S, H, W])."""
        maps = self.predict(aggregated_tokens_list, images, patch_start_idx, frames_chunk_size)
        pair = maps.pop("depth")[..., None], maps.pop("depth_conf")
        if self._extras is not None:
            self._extras = {name.removeprefix("depth_"): value for name, value in maps.items()}
        return pair

    def expect_extras(self) -> None:
        """Keep what the next call gives beyond the pair."""
        self._extras = {}

    def take_extras(self) -> dict[str, Tensor]:
        """What calls gave beyond the pair since :meth:`expect_extras`: entropy, weights, hypotheses."""
        extras, self._extras = self._extras, None
        return extras or {}


def is_depth_anything(state: Mapping[str, Tensor]) -> bool:
    """Whether these are a file's weights of Depth Anything 3, of whichever network."""
    return any(key.startswith(("model.backbone.pretrained.", _NESTED)) for key in state)


def build(state: Mapping[str, Tensor]) -> tuple[DepthAnything3, dict[str, Tensor]]:
    """The network that such weights belong to, untrained, and those of the weights that are its own.

    Raises:
        ValueError: a network without cameras, or of unknown size; the message says what is expected instead.
        ImportError: the ``depth-anything-3`` package is missing, or something that it needs.
    """
    token = state.get(_WIDTH_OF)
    width = token.shape[2] if token is not None and token.ndim == 3 else None
    cameras = "cameras" if any(key.startswith(_CAMERAS) for key in state) else "no cameras"
    if width not in _NAMES or cameras == "no cameras":
        found = f"one with {width} channels and {cameras}"
        if width is None:
            found = f"none of [1, 1, channels] for '{_WIDTH_OF}'"
        if any(key.startswith(_NESTED) for key in state):
            found = "a nested network"
        raise ValueError(f"{', '.join(_NAMES.values())}, which predict cameras, got {found}")
    os.environ.setdefault("DA3_LOG_LEVEL", "WARN")  # it would tell standard output how it is built and called
    from depth_anything_3.cfg import create_object, load_config

    config = load_config(f"depth_anything_3.configs.{_NAMES[width]}")
    for part in _SPLATS:
        config.pop(part, None)
    splats = tuple(f"model.{part}." for part in _SPLATS)
    own = {key: value for key, value in state.items() if not key.startswith(splats)}
    return DepthAnything3(create_object(config)), own

"""A VGGT-like model over many frames: the backbone sees all at once, the heads a few at a time.

``model(images)`` would keep every head's output for every frame; here each chunk's results leave before the next is
made, and of the backbone's tokens only the layers that the heads read are kept. So what grows with the number of frames
is what the backbone itself needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe3d.geometry import decode_pose
from moe3d.nn import MoEHead

FramePrediction = dict[str, Tensor]
"""One frame on the CPU in fp32: ``depth`` and ``confidence`` [H, W], ``intrinsics`` [3, 3], ``extrinsics`` [3, 4]; with
a point head ``points`` [H, W, 3] and ``points_confidence`` [H, W]; with a mixture-of-experts depth head ``entropy`` and
``stock_depth`` [H, W], ``weights`` and ``hypotheses`` [K, H, W]."""


@torch.inference_mode()
def predict_frames(
    model: Any,
    images: Tensor,
    frames_chunk: int = 8,
    dtype: torch.dtype = torch.float32,
    finished: Collection[int] = (),
    backbone_step: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[int, FramePrediction]]:
    """Run a model, frame by frame as far as it allows.

    The frames of a chunk are computed together whichever of them are finished, so that a resumed run gives the very
    numbers of one that was never interrupted.

    Args:
        model: has VGGT's ``aggregator``, ``camera_head``, ``depth_head`` and maybe ``point_head``, in eval mode. What a
            patched head gives beyond depth needs ``return_experts``.
        images: [S, 3, H, W] in [0, 1], on the CPU.
        frames_chunk: frames that the heads see at once, at least 1.
        dtype: that the backbone computes in (autocast); the heads compute in fp32, as VGGT's own do.
        finished: indices of frames that are not needed.
        backbone_step: called after each of the backbone's blocks (:func:`backbone_blocks`).

    Yields:
        (index, prediction) of the frames that are not finished, in their order.

    Raises:
        ValueError: the model has no depth or camera head.
        RuntimeError: not enough memory on the device.
    """
    for name in ("aggregator", "camera_head", "depth_head"):
        if getattr(model, name, None) is None:
            raise ValueError(f"model must have VGGT's {name}, got {type(model).__name__} without one")
    device, (height, width) = next(model.parameters()).device, images.shape[2:]
    batch = images[None].to(device)
    try:
        tokens, start = _run_backbone(model, batch, dtype, backbone_step)
        with torch.autocast(device.type, enabled=False):
            pose = model.camera_head(tokens)[-1][0].float()
            extrinsics, intrinsics = (camera.cpu() for camera in decode_pose(pose, (height, width)))
            layers = _only_what_heads_read(model, tokens)
            del tokens
            for first in range(0, len(images), frames_chunk):
                chunk = range(first, min(first + frames_chunk, len(images)))
                wanted = [index for index in chunk if index not in finished]
                if wanted:
                    maps = _run_heads(model, layers, batch, start, chunk)
                    for index in wanted:
                        camera = {"extrinsics": extrinsics[index], "intrinsics": intrinsics[index]}
                        yield index, camera | {name: value[index - first] for name, value in maps.items()}
    except torch.OutOfMemoryError:
        raise RuntimeError(
            f"{device} has too little memory for {len(images)} frames of {height}x{width}: use fewer frames, a smaller "
            "--width or a smaller --frames-chunk"
        ) from None


def backbone_blocks(model: Any) -> list[nn.Module]:
    """The backbone's attention blocks, for progress."""
    return [block for name in ("frame_blocks", "global_blocks") for block in getattr(model.aggregator, name, ())]


def _run_backbone(model: Any, batch: Tensor, dtype: torch.dtype, step: Callable[[], Any]) -> tuple[list[Tensor], int]:
    def count(*_) -> None:  # a hook that returns something would replace the block's output
        step()

    with ExitStack() as stack:
        for block in backbone_blocks(model):
            stack.callback(block.register_forward_hook(count).remove)
        with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model.aggregator(batch)


def _only_what_heads_read(model: Any, tokens: list[Tensor]) -> list[Tensor | None]:
    """VGGT gives 24 layers of tokens, of which its heads read four."""
    heads = [head for head in (model.depth_head, getattr(model, "point_head", None)) if head is not None]
    read = {layer % len(tokens) for head in heads for layer in head.intermediate_layer_idx}
    return [layer_tokens if layer in read else None for layer, layer_tokens in enumerate(tokens)]


def _run_heads(model: Any, tokens: list[Tensor | None], batch: Tensor, start: int, chunk: range) -> dict[str, Tensor]:
    """Maps of a chunk's frames, [frames, ...]."""
    frames = slice(chunk.start, chunk.stop)
    inputs = {
        "images": batch[:, frames],
        "patch_start_idx": start,
        "frames_chunk_size": None,
    }
    part = [None if layer is None else layer[:, frames].float() for layer in tokens]
    maps = _run_depth_head(model.depth_head, part, inputs)
    if getattr(model, "point_head", None) is not None:
        maps["points"], maps["points_confidence"] = model.point_head(part, **inputs)
    return {name: value[0].float().cpu() for name, value in maps.items()}


def _run_depth_head(head: Any, tokens: list[Tensor | None], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Maps with [1, frames] in front."""
    tail = getattr(head, "tail", None)  # of a patched one
    if tail is None or tail.num_experts == 1:
        depth, confidence = head(tokens, **inputs)
        return {"depth": depth[..., 0], "confidence": confidence}
    head.expect_extras()
    try:
        with _beside_stock(tail) as stock:
            depth, confidence = head(tokens, **inputs)
    finally:
        extras = head.take_extras()
    return {"depth": depth[..., 0], "confidence": confidence, "stock_depth": stock[0]} | extras


@contextmanager
def _beside_stock(tail: Any) -> Iterator[list[Tensor]]:
    """While the block runs, each call of the tail also gives what its stock output block makes of the same features:
    a list of [1, frames, H, W]. The costly part of the head, before the tail, runs only once."""
    depths: list[Tensor] = []
    stock = MoEHead.from_conv_block(
        tail.source_block,
        num_experts=1,
        activation=tail.activation,
        conf_activation=tail.conf_activation,
        backend=tail.backend,
        precision=tail.precision,
    )

    def run_stock(module, args, kwargs, output) -> None:
        features = {name: value for name, value in kwargs.items() if name != "image"}  # only the gate looks at it
        depths.append(stock(*args, **features).prediction.movedim(1, -1)[None, ..., 0])

    hook = tail.register_forward_hook(run_stock, with_kwargs=True)
    try:
        yield depths
    finally:
        hook.remove()

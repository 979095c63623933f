"""The frozen network's features on disk, and the tail of the depth head trained from them alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from moe3d.atomic import whole_file
from moe3d.position import position_tables
from moe3d.training.scenes import Batch, Corpus, Key, LiveScenes, collate

FRONT_END = "depth_head.scratch.output_conv1"  # the last layer before the tail
MANIFEST = "cache.json"


class FeatureNetwork(nn.Module):
    """The tail of a depth head on cached features: predicts what the whole model would, at a fraction of the cost.

    Args:
        tail: a :class:`~moe3d.nn.MoEHead`, or what is called like one.
        pos_embed: whether the model adds its position embedding before the tail.
    """

    def __init__(self, tail: nn.Module, pos_embed: bool = True) -> None:
        super().__init__()
        self.tail, self.pos_embed = tail, pos_embed

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The keys of a patched model's dictionary that belong to depth, from ``fused`` and ``images`` [B, S, ...]."""
        fused, images = batch["fused"], batch["images"]
        size = (images.shape[-2], images.shape[-1])
        flat = fused.flatten(0, 1)
        pos = position_tables(size, flat.shape[1], size[1] / size[0], flat) if self.pos_embed else None
        output = self.tail(flat, size, pos=pos, image=images.flatten(0, 1))
        lead = fused.shape[:2]
        predictions = {"depth": output.prediction.movedim(1, -1), "depth_entropy": output.entropy}
        if output.weights is not None:
            predictions |= {"depth_weights": output.weights, "depth_hypotheses": output.hypotheses.squeeze(2)}
        return {key: value.unflatten(0, lead) for key, value in predictions.items()}


class CachedScenes(Dataset):
    """Scenes with their features, from a folder that :func:`cache_scenes` filled; a step shows scenes of one shape.

    Args:
        folder: of the cache.
        seed: of the draws, which are with replacement.
        count: use the first so many only.
    """

    def __init__(self, folder: Path, seed: int, count: int | None = None) -> None:
        self.folder, self.seed = folder, seed
        self.files = sorted(folder.glob("scene-*.safetensors"))[:count]
        if not self.files:
            raise ValueError(f"{folder} holds no cached scenes")
        shapes: dict[tuple, list[Path]] = {}
        for file in self.files:
            shapes.setdefault(_shape(file), []).append(file)
        self._groups = [shapes[shape] for shape in sorted(shapes)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> Batch:
        """A scene as :class:`~moe3d.training.scenes.LiveScenes` has it, and ``fused`` [S, C, h, w]."""
        step, place = key
        shares = np.array([len(group) for group in self._groups]) / len(self.files)
        group = self._groups[np.random.default_rng([self.seed, step]).choice(len(self._groups), p=shares)]
        return read_scene(group[np.random.default_rng([self.seed, step, place]).integers(len(group))])


@torch.no_grad()
def cache_scenes(
    model: nn.Module,
    scenes: LiveScenes,
    count: int,
    folder: Path,
    process: int = 0,
    processes: int = 1,
    bf16: bool = False,
) -> None:
    """Write the first ``count`` scenes with the model's features into a folder; those that are there stay.

    Args:
        model: with VGGT's interface, patched or not, on any device; what is trained later must not come before
            ``output_conv1``.
        scenes: where scene i is the first of step i.
        process, processes: this process writes every ``processes``-th scene.
        bf16: run the backbone in bfloat16.

    Raises:
        ValueError: the folder holds features of another model or precision, or of other scenes.
    """
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    _check_manifest(folder, fingerprint(model, scenes, bf16))
    device = next(model.parameters()).device
    files = [(i, folder / f"scene-{i:06d}.safetensors") for i in range(process, count, processes)]
    missing = [(i, file) for i, file in files if not file.exists()]
    for i, file in tqdm(missing, desc="caching features", unit="scene", disable=None if process == 0 else True):
        scene = scenes[i, 0]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            fused = front_features(model, scene["images"].to(device)[None])
        _write_scene(file, scene | {"fused": fused})


def fingerprint(model: nn.Module, scenes: LiveScenes, bf16: bool) -> dict[str, Any]:
    """What decides the features: every weight before the tail, the precision, and the draw of the scenes.

    A dataset is known by the names of its frames, so that its folder may move.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if "output_conv2" not in name:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "precision": "bf16" if bf16 else "fp32",
        "datasets": [
            [corpus.name, *corpus.size, len(corpus.sequences), _frames_digest(corpus)] for corpus in scenes.corpora
        ],
        "frames": list(scenes.frames),
        "seed": scenes.seed,
    }


def _frames_digest(corpus: Corpus) -> str:
    """Of every frame that may be drawn, and of how far its depth counts."""
    frames = {sequence: list(corpus.dataset.sequences[sequence]) for sequence in corpus.sequences}
    return hashlib.sha256(json.dumps([frames, corpus.dataset.max_depth]).encode()).hexdigest()


def read_scene(file: Path) -> Batch:
    """One cached scene, in float32."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        scene: Batch = {key: opened.get_tensor(key) for key in opened.keys()}
        scene["names"] = json.loads(opened.metadata()["names"])
    scene["images"] = scene["images"].float() / 255
    scene["fused"] = scene["fused"].float()
    scene["valid"], scene["posed"] = scene["valid"].bool(), scene["posed"].bool()
    return scene


def read_batches(cached: CachedScenes) -> list[Batch]:
    """All cached scenes, one in each batch."""
    return [collate([read_scene(file)]) for file in cached.files]


def _write_scene(file: Path, scene: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    tensors = {
        "images": (scene["images"] * 255).round().byte(),
        "depth": scene["depth"].float(),
        "valid": scene["valid"].byte(),
        "pose_enc": scene["pose_enc"].float(),
        "posed": scene["posed"].byte(),
        "unit": scene["unit"].float(),
        "fused": scene["fused"].half().cpu().contiguous(),
    }
    with whole_file(file) as unfinished:
        unfinished.write_bytes(save(tensors, metadata={"names": json.dumps(scene["names"])}))


def front_features(model: nn.Module, images: Tensor) -> Tensor:
    """Features [S, C, h, w] of images [1, S, 3, H, W]; the head may see them some frames at a time."""
    parts: list[Tensor] = []
    hook = model.get_submodule(FRONT_END).register_forward_hook(lambda *call: parts.append(call[-1]))
    try:
        model(images)
    finally:
        hook.remove()
    return torch.cat(parts)


def _check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    file = folder / MANIFEST
    if not file.exists():
        with whole_file(file) as unfinished:
            unfinished.write_text(json.dumps(wanted, indent=1), "utf-8")
        return
    found = json.loads(file.read_text("utf-8"))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{folder} caches the features of other {' and '.join(different)}: expected {wanted[different[0]]}, "
            f"got {found.get(different[0])}; choose another folder"
        )


def _shape(file: Path) -> tuple:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return tuple(opened.get_slice("images").get_shape())

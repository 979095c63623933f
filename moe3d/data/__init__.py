"""Datasets behind one seam: :func:`open_dataset` gives ``.sequences`` and ``.load(sequence, frames)``."""

from __future__ import annotations

from importlib import import_module
from os import PathLike

from moe3d.data.sample import AllFramesSkipped, Dataset, Sample, Skipped

# One line per dataset: name -> "module:class". The module is imported when the dataset is opened, so that opening one
# never needs the libraries of another. The class is called with (root, split).
DATASETS = {
    "7scenes": "moe3d.data.sevenscenes:SevenScenes",
    "bonn": "moe3d.data.bonn:Bonn",
    "hypersim": "moe3d.data.hypersim:Hypersim",
    "kitti": "moe3d.data.kitti:KITTI",
    "motorcycle": "moe3d.data.motorcycle:Motorcycle",
    "nrgbd": "moe3d.data.nrgbd:NeuralRGBD",
    "nyuv2": "moe3d.data.nyuv2:NYUv2",
    "sintel": "moe3d.data.sintel:Sintel",
    "synthetic": "moe3d.data.synthetic:SyntheticDataset",
    "vkitti2": "moe3d.data.vkitti2:VirtualKITTI2",
}
WITHOUT_ROOT = ("motorcycle", "synthetic")  # nothing of them is on disk


def open_dataset(name: str, root: str | PathLike[str] | None = None, split: str | None = None) -> Dataset:
    """Open a dataset by name.

    Args:
        name: one of ``DATASETS``.
        root: the folder with the dataset's files; ``None`` for those that ship with the package.
        split: a part of the dataset; ``None`` is the one that evaluations use.

    Returns:
        A :class:`~moe3d.data.sample.Dataset` with ``.sequences`` (sequence name -> frame names), ``.load(sequence,
        frames)`` -> :class:`~moe3d.data.sample.Sample`, ``.has_poses``, ``.max_depth`` and ``.skipped``.

    Raises:
        ValueError: for an unknown name, a split that the dataset does not have, or a root that does not fit.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}', expected one of {', '.join(sorted(DATASETS))}")
    module, factory = DATASETS[name].split(":")
    return getattr(import_module(module), factory)(root, split)


__all__ = ["DATASETS", "WITHOUT_ROOT", "AllFramesSkipped", "Dataset", "Sample", "Skipped", "open_dataset"]

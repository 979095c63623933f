"""The choices that decide what a number means, and which frames of a dataset they pick."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from moe3d.data import Dataset, Sample
from moe3d.evaluation.sampling import sample_frames

TASKS = ("mv", "depth", "boundary")
CROPS = ("none", "eigen")
EIGEN_SIZE, EIGEN_ROWS, EIGEN_COLUMNS = (480, 640), slice(45, 471), slice(41, 601)
_UNREAD = {"mv": ("per",), "depth": ("sampling", "points"), "boundary": ("align", "sampling", "points")}


@dataclass(frozen=True)
class Protocol:
    """How a dataset is evaluated. A choice that a task does not read stays out of its report."""

    task: str
    """"mv", "depth" or "boundary"."""
    dataset: str
    align: str = "median"
    """depth: see ``fit_alignment``; mv: see ``score_sequence``. Boundary metrics align as each of them says."""
    per: str = "image"
    """depth and boundary: "image" shows a model one image at a time, "sequence" a sequence's frames together. Depth
    is aligned likewise, one image on its own or a sequence's frames by one alignment."""
    sampling: str = "all"
    """mv: which frames, see ``sample_frames``."""
    points: str = "depth"
    """mv: where points come from, see ``score_sequence``."""
    crop: str = "none"
    """"eigen": ground truth counts inside Eigen's crop of NYU-v2's 480x640 images only."""
    edge_filter: float | None = None
    """See :func:`~moe3d.evaluation.survives_edge_filter`."""
    limit: int | None = None
    """Evaluate the first ones only: images, or sequences where a sequence's frames belong together."""

    @property
    def together(self) -> bool:
        """Whether a sequence's frames are predicted together."""
        return self.task == "mv" or self.per == "sequence"

    def batches(self, dataset: Dataset) -> Iterator[tuple[str, list[str]]]:
        """(sequence, the frames of it to load together)."""
        count = 0
        for sequence, names in dataset.sequences.items():
            if self.task == "mv":
                names = sample_frames(names, self.dataset, self.sampling)
            for batch in [list(names)] if self.together else [[name] for name in names]:
                if count == self.limit:
                    return
                count += 1
                yield sequence, batch

    def mask(self, sample: Sample) -> np.ndarray:
        """[S, H, W] bool, where the ground truth counts.

        Raises:
            ValueError: the crop is for images of another size.
        """
        valid = sample.valid.numpy()
        if self.crop == "none":
            return valid
        if valid.shape[1:] != EIGEN_SIZE:
            raise ValueError(f"crop eigen is for images of 480x640, got {valid.shape[1]}x{valid.shape[2]}")
        inside = np.zeros_like(valid)
        inside[:, EIGEN_ROWS, EIGEN_COLUMNS] = True
        return valid & inside

    def describe(self, dataset: Dataset) -> dict:
        """What the task reads, JSON-ready."""
        choices = {key: value for key, value in asdict(self).items() if key not in _UNREAD[self.task]}
        limit = float(dataset.max_depth)
        return choices | {
            "max_depth": limit if np.isfinite(limit) else None,
            "views": "a sequence's frames together" if self.together else "one image at a time",
        }


# Where one scene has several sequences, or one sequence several scenes: the part of "<sequence>/<frame>" that names it.
_SCENES = {
    "7scenes": r"(.+)_seq-\d+/",
    "hypersim": r"(.+)_cam_\d+/",
    "vkitti2": r"(Scene\d+)_",
    "kitti": r"(?:kitti/)?(\d{4}_\d{2}_\d{2}_drive_\d{4}_sync)",
    "nyuv2": r"nyuv2/(.+)",  # 654 images of 215 scenes, which the files do not name
    "motorcycle": r"motorcycle/(.+)",
}


def scene_of(dataset: str, sequence: str, frame: str) -> Hashable:
    """What a bootstrap over scenes takes for one scene: the sequence, unless the dataset names scenes otherwise."""
    match = re.match(_SCENES.get(dataset, r"(.*)/"), f"{sequence}/{frame}")
    return match[1] if match else sequence

"""Which frames of a sequence a published multi-view evaluation uses: every n-th from the first one on."""

from __future__ import annotations

from collections.abc import Sequence

# Scheme -> stride on 7-Scenes and on NRGBD (None: CUT3R's rule), as in the code that Pi3, Spann3R and CUT3R released.
_STRIDES: dict[str, tuple[int, int | None]] = {
    "pi3-sparse": (200, 500),
    "pi3-dense": (40, 100),
    "spann3r": (20, 40),
    "cut3r": (200, None),
    "all": (1, 1),
}
SAMPLINGS = tuple(_STRIDES)
_PUBLISHED_ON = ("7scenes", "nrgbd")


def default_sampling(dataset: str) -> str:
    """ "pi3-sparse" on the datasets that the schemes were published for, "all" on others."""
    return "pi3-sparse" if dataset in _PUBLISHED_ON else "all"


def sample_frames(frames: Sequence[str], dataset: str, sampling: str) -> list[str]:
    """The frames 0, n, 2n ... of a sequence.

    Args:
        frames: all frames' names, in order.
        dataset: decides the stride n: NRGBD's on "nrgbd", that of 7-Scenes on every other.
        sampling: one of ``SAMPLINGS``. CUT3R's stride on NRGBD is half the sequence's length, at most 500.

    Raises:
        ValueError: an unknown scheme.
    """
    if sampling not in _STRIDES:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    stride = _STRIDES[sampling][dataset == "nrgbd"]
    if stride is None:
        stride = max(min(500, len(frames) // 2), 1)
    return list(frames[::stride])

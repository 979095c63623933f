"""The edge extractors that boundary metrics compare, and the windows they share."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.feature import canny

# (pixels, their neighbours) as slices of [H, W], for the neighbour to the right, left, below and above.
NEIGHBOURS = (
    (np.s_[:, :-1], np.s_[:, 1:]),
    (np.s_[:, 1:], np.s_[:, :-1]),
    (np.s_[:-1, :], np.s_[1:, :]),
    (np.s_[1:, :], np.s_[:-1, :]),
)


def nearer_ratios(depth: np.ndarray) -> list[np.ndarray]:
    """How many times nearer each neighbour is: x[neighbour] / x[pixel] with x = 1 / max(depth, 1e-6) (Depth Pro).

    One array per direction of `NEIGHBOURS`, [H, W-1] or [H-1, W].
    """
    inverse = 1 / np.maximum(depth, 1e-6)
    return [inverse[neighbour] / inverse[pixel] for pixel, neighbour in NEIGHBOURS]


def si_edges(depth: np.ndarray, mask: np.ndarray, threshold: float = 1.25) -> np.ndarray:
    """[H, W] bool: some neighbour is more than `threshold` times nearer, both pixels being in the mask."""
    edges = np.zeros(depth.shape, dtype=bool)
    for (pixel, neighbour), ratio in zip(NEIGHBOURS, nearer_ratios(depth), strict=True):
        edges[pixel] |= (ratio > threshold) & mask[pixel] & mask[neighbour]
    return edges


def relative_step(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[H, W]: the largest |step| / min(depth) to a 4-neighbour, both pixels being in the mask; 0 where there is none.

    The boundary pixels of the flying-point metric are those where it exceeds eta.
    """
    largest = np.zeros(depth.shape)
    for pixel, neighbour in NEIGHBOURS:
        step = np.abs(depth[neighbour] - depth[pixel]) / np.minimum(depth[neighbour], depth[pixel])
        step[~(mask[pixel] & mask[neighbour])] = 0
        np.maximum(largest[pixel], step, out=largest[pixel])
    return largest


def sobel_magnitude(depth: np.ndarray) -> np.ndarray:
    """[H, W] gradient magnitude of the unnormalised 1-2-1 Sobel operator, borders replicated (Hu et al., WACV 2019)."""
    return np.hypot(*(ndimage.sobel(depth, axis=axis, mode="nearest") for axis in (0, 1)))


def canny_edges(image: np.ndarray) -> np.ndarray:
    """[H, W] bool: Canny with the parameters of iBims-1 (Koch et al., arXiv 1805.01328)."""
    return canny(image, sigma=np.sqrt(2), low_threshold=0.15, high_threshold=0.3)


def fill_from_nearest(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[H, W]: each pixel outside the mask (which must not be empty) takes the value of the nearest pixel within."""
    nearest = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return depth[tuple(nearest)]


def min_max_normalised(depth: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1]; a constant map becomes 0."""
    low, high = depth.min(), depth.max()
    return (depth - low) / (high - low) if high > low else np.zeros_like(depth)


def distance_to(mask: np.ndarray) -> np.ndarray:
    """[H, W] Euclidean distance in pixels to the nearest pixel of the mask; infinite if it is empty."""
    return ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)


def dilate(mask: np.ndarray, size: int) -> np.ndarray:
    """[H, W] bool: the size x size window, cut off at the border, holds a set pixel."""
    return ndimage.maximum_filter(mask, size=size, mode="nearest")


def erode(mask: np.ndarray, size: int) -> np.ndarray:
    """[H, W] bool: the size x size window, cut off at the border, holds set pixels only."""
    return ndimage.minimum_filter(mask, size=size, mode="nearest")

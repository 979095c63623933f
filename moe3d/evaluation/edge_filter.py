"""The cheap alternative to a better head: throw away the points at depth edges."""

from __future__ import annotations

from numbers import Real

import numpy as np
from scipy import ndimage


def survives_edge_filter(depth, tolerance: float) -> np.ndarray:
    """Where a depth map is smooth enough to keep its points: (max - min of the 3x3 window) / depth <= tolerance.

    Windows are cut off at the image's border and skip depths that are not finite and positive, whose own pixels
    do not survive.

    Args:
        depth: [H, W] depth in any unit.
        tolerance: relative range allowed in a window, above 0; 0.03 is customary.

    Returns:
        [H, W] bool.

    Raises:
        ValueError: `tolerance` is not a finite positive number.
    """
    if not isinstance(tolerance, Real) or not 0 < tolerance < np.inf:
        raise ValueError(f"edge_filter must be a finite number above 0, got {tolerance!r}")
    depth = np.asarray(depth, dtype=np.float64)
    usable = np.isfinite(depth) & (depth > 0)
    # "nearest" repeats border pixels, which are in the cut-off window already.
    highest = ndimage.maximum_filter(np.where(usable, depth, -np.inf), size=3, mode="nearest")
    lowest = ndimage.minimum_filter(np.where(usable, depth, np.inf), size=3, mode="nearest")
    survives = np.zeros(depth.shape, dtype=bool)
    survives[usable] = (highest[usable] - lowest[usable]) / depth[usable] <= tolerance
    return survives

"""Flying points: predictions that hang between the two surfaces of a ground-truth boundary, and on neither."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe3d.evaluation.edges import dilate, relative_step
from moe3d.evaluation.frame import Frame

WINDOW = 5
DEFAULT_ETA, DEFAULT_BETA = 0.05, 0.2
SWEEP_ETAS, SWEEP_BETAS = (0.02, 0.05, 0.1), (0.1, 0.2, 0.3)
BOOTSTRAP_SAMPLES, BOOTSTRAP_LEVEL = 2000, 0.95


@dataclass(frozen=True)
class FlyingPoints:
    """Maps of one image, [H, W] bool: the pixels that fly, and the boundary pixels they are counted against."""

    flying: np.ndarray
    boundary: np.ndarray

    @property
    def rate(self) -> float | None:
        """flying / boundary pixels; None without boundary pixels."""
        return _rate(self.flying.sum(), self.boundary.sum())


def flying_points(frame: Frame, eta: float = DEFAULT_ETA, beta: float = DEFAULT_BETA) -> FlyingPoints:
    """Find the flying points of one image.

    A valid pixel is on a boundary if a valid 4-neighbour differs by more than eta of the smaller depth. The valid
    ground truth in its 5x5 window, cut off at the border, is split in two at the largest gap of the sorted depths (the
    nearest, where several are largest); d1 < d2 are the medians of the two groups. The prediction flies if it lies in
    [d1 + beta (d2 - d1), d2 - beta (d2 - d1)], scaled by median(truth) / median(prediction) over the kept pixels with
    no boundary in their 5x5 window. So ground truth may fly itself, where a window holds more than two surfaces or
    steep ones: read a rate beside that floor.

    Boundary pixels without a finite positive prediction are not counted; those the edge filter dropped are, and do not
    fly. Where no pixel is left to fit the scale to, nothing is counted.

    Args:
        frame: built with `resample="nearest"`.
        eta: relative depth step that makes a boundary, above 0.
        beta: fraction of the gap that still belongs to either surface, from 0 to 0.5.

    Raises:
        ValueError: eta or beta out of range.
    """
    if not eta > 0:
        raise ValueError(f"eta must be above 0, got {eta!r}")
    if not 0 <= beta <= 0.5:
        raise ValueError(f"beta must be between 0 and 0.5, got {beta!r}")
    return next(_flying_points(frame, [eta], [beta]))[-1]


def flying_sweep(frame: Frame) -> list[dict[str, float | int | None]]:
    """One image's flying and boundary pixels, and rate, for each eta in {.02, .05, .1} and beta in {.1, .2, .3}."""
    return [
        _entry(eta, beta, int(points.flying.sum()), int(points.boundary.sum()))
        for eta, beta, points in _flying_points(frame, SWEEP_ETAS, SWEEP_BETAS)
    ]


def aggregate_sweeps(sweeps: Sequence[list[dict]]) -> list[dict[str, float | int | None]]:
    """`flying_sweep` of many images in one: total flying / total boundary pixels."""
    return [
        _entry(same[0]["eta"], same[0]["beta"], sum(e["flying"] for e in same), sum(e["boundary"] for e in same))
        for same in zip(*sweeps, strict=True)
    ]


def default_entry(sweep: list[dict]) -> dict[str, Any]:
    """The entry of a sweep that the headline rate reports: eta 0.05, beta 0.2."""
    return next(entry for entry in sweep if (entry["eta"], entry["beta"]) == (DEFAULT_ETA, DEFAULT_BETA))


def flying_rate_interval(
    flying: Sequence[int], boundary: Sequence[int], scenes: Sequence[Hashable], seed: int = 0
) -> list[float] | None:
    """95% confidence interval of total flying / total boundary pixels, by percentile bootstrap over scenes.

    Frames of one scene are alike, so scenes are drawn, not frames.

    Args:
        flying, boundary: [N] pixel counts per image.
        scenes: [N] the scene each image belongs to.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        [low, high]; None with fewer than two scenes that have boundary pixels.
    """
    totals: dict[Hashable, np.ndarray] = {}
    for scene, *counts in zip(scenes, flying, boundary, strict=True):
        totals[scene] = totals.get(scene, 0) + np.array(counts)
    per_scene = np.array([total for total in totals.values() if total[1]])
    if len(per_scene) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(per_scene), size=(BOOTSTRAP_SAMPLES, len(per_scene)))
    drawn_flying, drawn_boundary = per_scene[draws].sum(axis=1).T
    tail = (1 - BOOTSTRAP_LEVEL) / 2
    return np.quantile(drawn_flying / drawn_boundary, [tail, 1 - tail]).tolist()


def _flying_points(frame: Frame, etas, betas):
    """Yield (eta, beta, FlyingPoints). The two surfaces do not depend on eta, so they are found once."""
    step = relative_step(frame.truth, frame.valid)
    near, far = np.zeros((2, *step.shape))
    widest = step > min(etas)
    near[widest], far[widest] = _two_surfaces(frame, widest)
    gap = far - near
    for eta in etas:
        boundary = step > eta
        scale = _interior_scale(frame, boundary)
        counted = boundary & frame.compared & (scale is not None)
        predicted = frame.prediction * (scale or 1.0)
        for beta in betas:
            between = (predicted >= near + beta * gap) & (predicted <= far - beta * gap)
            yield eta, beta, FlyingPoints(between & counted & frame.kept, counted)


def _two_surfaces(frame: Frame, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(near, far) depths [N] of the two surfaces around the N boundary pixels `at`."""
    padded = np.pad(np.where(frame.valid, frame.truth, np.nan), WINDOW // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW))[at].reshape(-1, WINDOW**2)
    depths = np.sort(windows, axis=1)  # NaN last
    count = np.isfinite(depths).sum(axis=1)
    split = np.nanargmax(np.diff(depths, axis=1), axis=1) + 1  # a boundary's window holds two depths at least
    return _median_of_run(depths, np.zeros_like(split), split), _median_of_run(depths, split, count)


def _median_of_run(rows: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """[N] medians of rows[n, start[n]:stop[n]], each run sorted."""
    every = np.arange(len(rows))
    return (rows[every, (start + stop - 1) // 2] + rows[every, (start + stop) // 2]) / 2


def _interior_scale(frame: Frame, boundary: np.ndarray) -> float | None:
    interior = frame.kept & ~dilate(boundary, WINDOW)
    if not interior.any():
        return None
    return float(np.median(frame.truth[interior]) / np.median(frame.prediction[interior]))


def _entry(eta: float, beta: float, flying: int, boundary: int) -> dict[str, float | int | None]:
    return {"eta": eta, "beta": beta, "flying": flying, "boundary": boundary, "rate": _rate(flying, boundary)}


def _rate(flying: int, boundary: int) -> float | None:
    return float(flying / boundary) if boundary else None

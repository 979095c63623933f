"""How long the evaluation's two heavy parts take: ``python -m bench.evaluation [POINTS]``.

The boundary suite on one 518x392 pair, and accuracy, completeness and normal consistency of two clouds of a million
unordered points each, with and without ICP. Prints wall and processor time, and the process's peak memory.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
from scipy import ndimage

from moe3d.data import open_dataset
from moe3d.evaluation import Cloud, boundary_report, icp, resize_nearest, score_cloud

SIZE = (392, 518)
REPEATS = 7


def main(points: int = 1_000_000) -> None:
    pair = real_pair()
    _report(f"boundary suite, {SIZE[1]}x{SIZE[0]}", min(_timed(lambda: boundary_report(*pair)) for _ in range(REPEATS)))
    shift = np.array([0.02, -0.01, 0.01])
    predicted, true = wavy_cloud(points, 0) + shift, wavy_cloud(points, 1)
    _report(f"Acc, Comp, NC of {points:,} points", _timed(lambda: score_cloud(Cloud(predicted), Cloud(true))))
    _report("ICP of these", _timed(lambda: icp(predicted, Cloud(true))))
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def real_pair() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, truth, validity and intrinsics: Motorcycle, and a blurred copy of it."""
    sample = open_dataset("motorcycle").load("motorcycle", ["left"])
    truth, valid = (resize_nearest(tensor[0].numpy(), SIZE) for tensor in (sample.depth.double(), sample.valid))
    return ndimage.gaussian_filter(truth, 1.5) + 0.01, truth, valid, sample.intrinsics[0].numpy()


def wavy_cloud(count: int, seed: int) -> np.ndarray:
    """[N, 3] unordered points of a surface, 4 m wide."""
    x, y = np.random.default_rng(seed).uniform(-2, 2, (2, count))
    return np.column_stack([x, y, 0.5 * np.sin(2 * x) + 0.3 * np.cos(3 * y)])


def _timed(work) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def _report(what: str, times: tuple[float, float]) -> None:
    print(f"{what}: {times[0]:.2f} s, processor {times[1]:.2f} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

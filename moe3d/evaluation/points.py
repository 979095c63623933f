"""Point clouds: similarity alignment, ICP, normals, and how accurate and complete a reconstruction is."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

ICP_THRESHOLD = 0.1  # metres
ICP_ITERATIONS = 30
ICP_TOLERANCE = 1e-6  # of the change in fitness and in RMSE
NORMAL_NEIGHBOURS = 30
ALL_CORES = -1
_CHUNK = 1 << 17  # points whose neighbourhoods are in memory at once

POINT_KEYS = ("acc_mean", "acc_median", "comp_mean", "comp_median", "nc_mean", "nc_median")


class Similarity(NamedTuple):
    """point -> scale * rotation @ point + translation."""

    scale: float
    rotation: np.ndarray
    """[3, 3], proper."""
    translation: np.ndarray
    """[3]."""

    def apply(self, points: np.ndarray) -> np.ndarray:
        """[..., 3] -> [..., 3]."""
        return self.scale * points @ self.rotation.T + self.translation


IDENTITY = Similarity(1.0, np.eye(3), np.zeros(3))


class Cloud:
    """N points with what is needed more than once: a search tree and normals, the latter made when first asked for.

    Points are kept in the tree's order: neighbours in space are then neighbours in memory, which makes searching a
    million unordered points five times as fast.

    Args:
        points: [N, 3] finite coordinates.
    """

    points: np.ndarray
    """[N, 3] float64, in the tree's order."""
    order: np.ndarray
    """[N]: ``points`` is the given array at these indices."""
    tree: cKDTree

    def __init__(self, points: np.ndarray) -> None:
        points = np.asarray(points, dtype=np.float64)
        self.order = cKDTree(points).indices if len(points) else np.arange(0)
        self.points = points[self.order]
        self.tree = cKDTree(self.points)

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def normals(self) -> np.ndarray:
        """[N, 3] unit normals of either sign (:func:`estimate_normals`)."""
        return estimate_normals(self)


def fit_similarity(source: np.ndarray, target: np.ndarray, with_scale: bool = True) -> Similarity:
    """The least-squares similarity from one set of points to the corresponding other (Umeyama, TPAMI 1991).

    Args:
        source, target: [N, 3] corresponding points.
        with_scale: False fits a rigid motion.

    Returns:
        The similarity; where the points leave a choice (fewer than three, or collinear ones), one of the best. The
        scale is 1 if all source points coincide.

    Raises:
        ValueError: shapes that disagree, or no points.
    """
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3 or len(source) == 0:
        raise ValueError(
            f"source and target must be [N, 3] with the same N >= 1, got {list(source.shape)} and {list(target.shape)}"
        )
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    centred = source - source_mean
    u, singular, vt = np.linalg.svd((target - target_mean).T @ centred / len(source))
    sign = np.array([1.0, 1.0, 1.0 if np.linalg.det(u) * np.linalg.det(vt) > 0 else -1.0])
    rotation = (u * sign) @ vt
    variance = np.mean(np.sum(centred**2, axis=1))
    scale = float(singular @ sign / variance) if with_scale and variance > 0 else 1.0
    return Similarity(scale, rotation, target_mean - scale * rotation @ source_mean)


def icp(source: np.ndarray, target: Cloud, threshold: float = ICP_THRESHOLD) -> Similarity:
    """Point-to-point ICP from where the source is, with the defaults of Open3D's ``registration_icp``.

    Each round pairs every source point with its nearest target point, if that is closer than the threshold, and moves
    the source by the best rigid motion for these pairs. It stops after 30 rounds, or when the fraction of paired points
    and their RMSE both change by less than 1e-6.

    Args:
        source: [N, 3] points, N >= 1.
        target: at least one point.
        threshold: metres.

    Returns:
        The rigid motion for the source; the identity where no point is ever paired.
    """
    pairing = _Pairing(Cloud(source).points, target, threshold)
    motion = IDENTITY
    fitness, rmse = pairing.fitness, pairing.rmse
    for _ in range(ICP_ITERATIONS):
        if not pairing.paired.any():
            break
        partners = target.points[pairing.nearest[pairing.paired]]
        update = fit_similarity(pairing.points[pairing.paired], partners, with_scale=False)
        motion = Similarity(1.0, update.rotation @ motion.rotation, update.apply(motion.translation))
        pairing.move(update)
        before, (fitness, rmse) = (fitness, rmse), (pairing.fitness, pairing.rmse)
        if abs(fitness - before[0]) < ICP_TOLERANCE and abs(rmse - before[1]) < ICP_TOLERANCE:
            break
    return motion


class _Pairing:
    """Moving points and the nearest target of each, searched again only where it may have changed.

    While a point is m away from where its targets were searched, at distances d1 and d2 of the first and the second,
    its nearest target stays the same if d1 + m < d2 - m. Late rounds of ICP move points very little, and search few.
    """

    def __init__(self, points: np.ndarray, target: Cloud, threshold: float) -> None:
        self.points, self._target, self._threshold = points, target, threshold
        self._limit = 1.5 * threshold  # searched beyond the threshold: whoever is alone stays so for a while
        self._searched_at = points.copy()
        self.nearest = np.zeros(len(points), dtype=np.intp)
        self._first, self._second = np.zeros((2, len(points)))
        self._search(np.arange(len(points)))
        self._measure()

    def move(self, motion: Similarity) -> None:
        self.points = motion.apply(self.points)
        moved = np.linalg.norm(self.points - self._searched_at, axis=1)
        alone = np.isinf(self._first)
        same = np.where(alone, self._limit - moved >= self._threshold, self._first + moved < self._second - moved)
        self._search(np.flatnonzero(~same))
        self._measure()

    def _search(self, index: np.ndarray) -> None:
        distance, nearest = self._target.tree.query(
            self.points[index], k=2, distance_upper_bound=self._limit, workers=ALL_CORES
        )
        self._searched_at[index] = self.points[index]
        self._first[index], self._second[index] = distance[:, 0], np.minimum(distance[:, 1], self._limit)
        self.nearest[index] = np.where(np.isinf(distance[:, 0]), 0, nearest[:, 0])

    def _measure(self) -> None:
        distance = np.linalg.norm(self.points - self._target.points[self.nearest], axis=1)
        self.paired = np.isfinite(self._first) & (distance < self._threshold)
        self.fitness = float(self.paired.mean())
        self.rmse = float(np.sqrt(np.mean(distance[self.paired] ** 2))) if self.paired.any() else 0.0


def estimate_normals(cloud: Cloud, neighbours: int = NORMAL_NEIGHBOURS) -> np.ndarray:
    """Unit normals of either sign: where a point's 30 nearest neighbours, itself among them, vary least.

    As Open3D's ``estimate_normals()`` does by default. With fewer than three neighbours no direction is one, and
    the normal is (0, 0, 1).

    Returns:
        [N, 3].
    """
    neighbours = min(neighbours, len(cloud))
    if neighbours < 3:
        return np.tile([0.0, 0.0, 1.0], (len(cloud), 1))
    normals = np.empty_like(cloud.points)
    for start in range(0, len(cloud), _CHUNK):
        part = slice(start, start + _CHUNK)
        _, nearest = cloud.tree.query(cloud.points[part], k=neighbours, workers=ALL_CORES)
        around = cloud.points[nearest]
        around -= around.mean(axis=1, keepdims=True)
        _, directions = np.linalg.eigh(around.mT @ around)  # the smallest eigenvalue first
        normals[part] = directions[:, :, 0]
    return normals


class CloudScore(NamedTuple):
    """How well a predicted cloud stands for the true one."""

    metrics: dict[str, float | None]
    """Of ``POINT_KEYS``; distances in the clouds' unit."""
    distances: np.ndarray
    """[N], from each predicted point, in the order given to :class:`Cloud`, to the nearest true one; NaN without."""


def score_cloud(prediction: Cloud, truth: Cloud) -> CloudScore:
    """Accuracy, completeness and normal consistency of two clouds in one frame (Azinović et al., arXiv 2104.04532).

    acc is the distance from predicted points to the nearest true one, comp the distance from true points to the nearest
    predicted one, each as mean and median over all points. nc is |normal . normal of the nearest point|, the mean of
    both directions' means, and of both directions' medians. All None where either cloud is empty.
    """
    if not len(prediction) or not len(truth):
        return CloudScore(dict.fromkeys(POINT_KEYS), np.full(len(prediction), np.nan))
    acc, there = truth.tree.query(prediction.points, workers=ALL_CORES)
    comp, back = prediction.tree.query(truth.points, workers=ALL_CORES)
    consistency = [
        np.abs(np.sum(truth.normals[there] * prediction.normals, axis=1)),
        np.abs(np.sum(truth.normals * prediction.normals[back], axis=1)),
    ]
    metrics = {
        "acc_mean": acc.mean(),
        "acc_median": np.median(acc),
        "comp_mean": comp.mean(),
        "comp_median": np.median(comp),
        "nc_mean": np.mean([np.mean(c) for c in consistency]),
        "nc_median": np.mean([np.median(c) for c in consistency]),
    }
    distances = np.empty_like(acc)
    distances[prediction.order] = acc
    return CloudScore({key: float(value) for key, value in metrics.items()}, distances)

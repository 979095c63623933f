"""What a page shows of a frame agrees with the frame's figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe3d.data.sample import Sample
from moe3d.evaluation.judge import judge_boundary, judge_depth
from moe3d.evaluation.predictions import Predictions
from moe3d.evaluation.protocol import Protocol


@pytest.mark.parametrize(
    ("judge", "task", "figure"), [(judge_depth, "depth", "abs_rel"), (judge_boundary, "boundary", "abs_rel_boundary")]
)
def test_the_errors_are_those_that_the_figure_is_the_mean_of(random_layers, judge, task, figure):
    maps = [random_layers(seed, (30, 40)) for seed in range(2)]
    truth = torch.from_numpy(np.stack([truth for _, truth in maps])).float()
    cameras = np.tile(np.array([[30.0, 0, 19.5], [0, 30, 14.5], [0, 0, 1]]), (2, 1, 1))
    poses = np.tile(np.eye(4)[:3], (2, 1, 1))
    sample = Sample(torch.zeros(2, 3, 30, 40), truth, truth > 0, torch.from_numpy(cameras).float(), None, ["a", "b"])
    predictions = Predictions(["a", "b"], np.stack([prediction for prediction, _ in maps]), cameras, poses)
    for frame in judge(sample, sample.valid.numpy(), predictions, Protocol(task, "some")).frames:
        assert frame.errors.size and frame.errors.mean() == pytest.approx(frame.metrics[figure])

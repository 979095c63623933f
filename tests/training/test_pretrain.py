"""Pretraining: it learns, and an interrupted run goes on as if nothing had been."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe3d.training.pool import Pool
from moe3d.training.pretrain import PretrainOptions, Run, prepare, pretrain_losses

OPTIONS = PretrainOptions(steps=6, minutes=1e6, frames=2, stages=((0.0, 56 * 70),), checkpoint_seconds=0.0)


def test_a_few_steps_reduce_the_loss_of_every_task(pool_folder, tmp_path):
    run = Run(tmp_path, replace(OPTIONS, steps=500))
    pool = Pool(pool_folder)
    pool.refresh()
    rng = np.random.default_rng(0)
    batch = prepare(pool.draw(rng, 6), rng, pixels=56 * 70)

    def losses():
        with torch.no_grad():
            return pretrain_losses(run.model(batch["images"]), batch)

    before = losses()
    for _ in range(30):
        run._take_step(pool)
    after = losses()
    for name in ("log_depth", "confidence", "camera"):
        assert after[name] < 0.9 * before[name], name


class Interrupted(Exception):
    pass


class BreakingPool(Pool):
    """Interrupts the run in its fourth step."""

    draws = 0

    def draw(self, rng, frames):
        if self.draws == 3:
            raise Interrupted
        self.draws += 1
        return super().draw(rng, frames)


def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(pool_folder, tmp_path):
    whole = Run(tmp_path / "whole", OPTIONS).train(Pool(pool_folder))
    with pytest.raises(Interrupted):
        Run(tmp_path / "parts", OPTIONS).train(BreakingPool(pool_folder))
    resumed = Run(tmp_path / "parts", OPTIONS)
    assert resumed.step == 3
    parts = resumed.train(Pool(pool_folder))
    assert resumed.step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(pool_folder, tmp_path):
    run = Run(tmp_path, OPTIONS)
    run.save()
    with torch.no_grad():
        run.model.aggregator.camera_token.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"not finite at step 0.*checkpoint\.pt"):
        run.train(Pool(pool_folder))
    assert all(p.isfinite().all() for p in Run(tmp_path, OPTIONS).model.parameters())


def test_the_learning_rate_warms_up_and_ends_at_zero(pool_folder, tmp_path):
    run = Run(tmp_path, OPTIONS)
    pool = Pool(pool_folder)
    pool.refresh()
    rates = []
    for progress in (0, 0.03, 0.5, 0.999):
        run.step = round(progress * 10_000)
        run.options = replace(OPTIONS, steps=10_000)
        rates.append(run._take_step(pool)["rate"])
    assert rates[0] < 0.1 * rates[1]
    assert rates[1] > rates[2] > rates[3]
    assert rates[3] < 1e-5 * OPTIONS.learning_rate / 1e-3

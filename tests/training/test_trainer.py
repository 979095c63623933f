"""The trainer: equal runs give equal bits, however they are interrupted, accumulated or distributed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import multiprocessing

from moe3d.losses import Schedule
from moe3d.training.checkpoint import load_checkpoint
from moe3d.training.features import CachedScenes, read_batches
from moe3d.training.recipes import BEST, PAPER, RECIPES
from moe3d.training.trainer import CHECKPOINT, DivergedError, Trainer, TrainOptions, warm_up_cosine
from moe3d.training.validate import Validation
from support.training import first_gradients, model_trainer, process, stop_after, trainer

OPTIONS = TrainOptions(steps=6, learning_rate=3e-3, save_every=1, log_every=1, validate_every=3)
RECIPE = replace(PAPER, gate_hidden=8, camera_weight=0)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.supervised.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", RECIPES)
def test_training_reduces_the_loss_of_every_recipe(tiny_weights, cache, name):
    recipe = replace(RECIPES[name], gate_hidden=8)
    run = trainer(tiny_weights, cache, replace(OPTIONS, steps=150, learning_rate=5e-3), recipe)
    batches = read_batches(CachedScenes(cache, 0))

    @torch.no_grad()
    def loss():
        return sum(run.supervised(batch, 0.0)["total"].item() for batch in batches)

    before = loss()
    run.train()
    assert loss() < before - 0.1 * abs(before)


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_never_stopped(tiny_weights, cache, tmp_path):
    options = replace(OPTIONS, ema=0.8)
    whole = trainer(tiny_weights, cache, options, RECIPE, tmp_path / "whole")
    whole.train()

    stop_after(trainer(tiny_weights, cache, options, RECIPE, tmp_path / "parts"), 4)
    (tmp_path / "parts" / f".{CHECKPOINT}.123.tmp").write_text("what a kill during writing leaves")
    resumed = trainer(tiny_weights, cache, options, RECIPE, tmp_path / "parts", resume=True)
    assert resumed.step == 4
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {CHECKPOINT, "tensorboard"}
    resumed.train()
    assert_equal(weights(whole), weights(resumed))
    there, here = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert there["unit"] == here["unit"] and there["step"] == here["step"] == 6
    for moment in ("exp_avg", "exp_avg_sq"):
        states = [{n: s[moment] for n, s in state["optimizer"]["state"].items()} for state in (there, here)]
        assert_equal(*states)


def test_a_folder_with_a_checkpoint_is_not_overwritten_and_not_continued_as_another_run(tiny_weights, cache, tmp_path):
    trainer(tiny_weights, cache, replace(OPTIONS, steps=1), RECIPE, tmp_path).train()
    with pytest.raises(ValueError, match="exists: resume the run, or choose another folder"):
        trainer(tiny_weights, cache, OPTIONS, RECIPE, tmp_path)
    with pytest.raises(ValueError, match="is of a run with steps = 1, and this one has 6"):
        trainer(tiny_weights, cache, OPTIONS, RECIPE, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer(tiny_weights, cache, OPTIONS, RECIPE, tmp_path / "empty", resume=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_names_its_frames_and_keeps_the_last_good_state(
    tiny_weights, cache, tmp_path, monkeypatch, what
):
    run = trainer(tiny_weights, cache, OPTIONS, RECIPE, tmp_path)
    scenes = run.scenes
    names = []

    class Poisoned:
        def __getitem__(self, key):
            scene = scenes[key]
            if key[0] == 3 and what == "loss":
                scene["depth"] = scene["depth"].where(scene["depth"] < scene["depth"].max(), torch.nan)
            if key[0] == 3:
                names.extend(scene["names"])
            return scene

    run.scenes = Poisoned()
    if what == "gradient":
        parameter = next(iter(run.supervised.parameters()))
        parameter.register_hook(lambda gradient: gradient * (torch.nan if run.step == 3 else 1))
    with pytest.raises(
        DivergedError, match=f"the {what} is not finite at step 3, on the frames synthetic/scene-"
    ) as error:
        run.train()
    assert all(name in str(error.value) for name in names)
    state = load_checkpoint(tmp_path / CHECKPOINT)
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())


def test_accumulated_batches_are_one_large_batch(tiny_weights, cache):
    runs = [
        trainer(tiny_weights, cache, replace(OPTIONS, steps=2, batch=batch, accumulate=turns), RECIPE)
        for batch, turns in ((4, 1), (2, 2))
    ]
    for run in runs:
        run._set_unit(0.1)  # it is measured on the first pass, which differs
    gradients = [first_gradients(run) for run in runs]
    for run in runs:
        run.train()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


def test_two_processes_with_whole_or_sharded_weights_are_one_with_the_doubled_batch(tiny_weights, cache, tmp_path):
    options = replace(OPTIONS, steps=2, batch=1, ema=0.5)
    arguments = (tiny_weights, cache, options, RECIPE)
    multiprocessing.spawn(process, (2, str(tmp_path), arguments), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    single = trainer(tiny_weights, cache, replace(options, batch=2), RECIPE)
    start = weights(single)
    gradients = first_gradients(single)
    single.train()
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    assert_equal(sharded["weights"], sharded["resumed"])
    assert_equal(ranks[0]["gradients"], ranks[1]["gradients"])
    assert gradients.keys() == {name.removeprefix("module.") for name in ranks[0]["gradients"]}
    for name, value in gradients.items():
        torch.testing.assert_close(ranks[0]["gradients"][name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
    for name, value in weights(single).items():
        moved = (value - start[name]).abs().max().item()
        assert moved > 0, name
        # Adam divides by the gradient's size, so a gradient near zero turns rounding into a part of a step.
        for several in (ranks[0], sharded):
            difference = (several["weights"][name] - value).abs()
            assert difference.max() < 0.1 * moved and difference.mean() < 1e-3 * moved, name

    # What two processes averaged, one can go on with.
    alone = trainer(*arguments, tmp_path / "whole", resume=True)
    assert_equal(alone.ema.average, ranks[0]["weights"])

    model = model_trainer(tiny_weights, cache, replace(options, batch=2), RECIPE)
    model.train()
    learned = {name: p for name, p in weights(model).items() if name in sharded["model"]}
    assert learned.keys() == sharded["model"].keys()
    for name, value in learned.items():
        torch.testing.assert_close(sharded["model"][name], value, rtol=0, atol=1e-3, msg=name)


def test_the_average_is_what_is_kept(tiny_weights, cache):
    run = trainer(tiny_weights, cache, replace(OPTIONS, steps=4, ema=0.5), RECIPE)
    history = []
    run.optimizer.optimizer.register_step_post_hook(lambda *_: history.append(weights(run)))
    average = weights(run)
    run.train()
    for step in history:
        average = {name: 0.5 * value + 0.5 * step[name] for name, value in average.items()}
    for name, value in weights(run).items():
        torch.testing.assert_close(value, average[name])


def test_temperature_and_learning_rate_follow_their_schedules(tiny_weights, cache):
    options = replace(OPTIONS, steps=8, warm_up=0.25, temperature=Schedule(1, 0.25, "exponential"))
    run = trainer(tiny_weights, cache, options, RECIPE)
    seen = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append((run.tail.temperature, optimizer.param_groups[0]["lr"]))
    )
    run.train()
    assert [t for t, _ in seen] == pytest.approx([0.25 ** (step / 8) for step in range(8)])
    rates = [rate for _, rate in seen]
    assert rates == pytest.approx([3e-3 * warm_up_cosine(step / 8, 0.25) for step in range(8)])
    assert rates[0] < rates[1] < rates[2] == pytest.approx(3e-3)
    assert all(a > b for a, b in pairwise(rates[2:]))


def test_numbers_and_pictures_are_logged_and_validation_changes_nothing(tiny_weights, cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quiet = trainer(tiny_weights, cache, OPTIONS, RECIPE)
    quiet.train()
    validation = Validation(read_batches(CachedScenes(cache, 0))[:2])
    decode = replace(RECIPE, mode="argmax", sharpen=1).set_decode
    run = trainer(tiny_weights, cache, OPTIONS, RECIPE, tmp_path, validation=validation, decode=decode)
    run.train()
    assert_equal(weights(quiet), weights(run))
    assert (run.tail.mode, run.tail.sharpen, run.tail.temperature) == ("mean", 0, quiet.tail.temperature)
    decode(run.tail)
    assert run.metrics == validation.run(run.supervised).metrics

    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars, images = log.Tags()["scalars"], log.Tags()["images"]
    assert {"train/total", "train/depth", "train/entropy", "train/learning_rate", "train/mean_weight/3"} <= set(scalars)
    assert {"validation/si_f1", "validation/flying_rate", "validation/dead_experts"} <= set(scalars)
    assert set(images) == {"image", "truth", "depth", "gate", "entropy"}
    assert [event.step for event in log.Scalars("train/total")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in log.Scalars("validation/abs_rel")] == [3, 6]
    assert sum(log.Scalars(f"train/mean_weight/{k}")[0].value for k in range(4)) == pytest.approx(1)


def test_a_learned_scale_learns_with_the_head(tiny_weights, cache):
    recipe = replace(BEST, gate_hidden=8, learn_scale=True)
    run = trainer(tiny_weights, cache, OPTIONS, recipe)
    run.train()
    scale = run.supervised.objective.losses["depth"].log_scale.exp()
    assert scale.shape == (2,) and (scale != 0.1).all()

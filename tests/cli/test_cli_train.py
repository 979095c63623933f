"""``moe3d train``: to a head that loads, killed and resumed on the way; wrong usage is told in one sentence."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from moe3d.cli import main
from moe3d.integrations import load_head, patched_heads
from moe3d.models import MiniVGGT, load_mini, save_mini
from moe3d.models.load import load_model
from moe3d.training.checkpoint import load_checkpoint
from moe3d.training.trainer import Trainer
from support.datasets import CASES

STEPS = 16
OPTIONS = f"--size 56x84 --frames 1-2 --steps {STEPS} --batch 2 --gate-hidden 8 --lr 1e-3 --workers 0 --ema 0.9"
REQUIRED = ["train", "--dataset", "synthetic", "--model", "mini", "--out", "out"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_mini(MiniVGGT(embed_dim=32, num_heads=2, features=32), path)
    return path


@pytest.fixture(scope="module")
def command(weights, tmp_path_factory):
    """All but --out, on cached features of three scenes; the first run fills the cache."""
    return [
        "train", "--dataset", "synthetic", "--model", str(weights), *OPTIONS.split(), "--save-every", "1",
        "--cache-features", str(tmp_path_factory.mktemp("cache")), "--cache-scenes", "3", "--validation-scenes", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main([*command, "--out", str(out)]) == 0
    return out


def test_a_run_writes_a_head_that_loads_and_decodes_as_its_recipe_says(uninterrupted, weights):
    assert {file.name for file in uninterrupted.iterdir()} == {"checkpoint.pt", "head.safetensors", "tensorboard"}
    model = load_head(load_mini(path=weights), uninterrupted / "head.safetensors")
    tail = patched_heads(model)["depth"].tail
    assert (tail.num_experts, tail.gate_hidden, tail.mode, tail.temperature) == (4, 8, "mean", 0.5)
    assert tail.gate_w2.abs().sum() > 0
    assert model(torch.rand(1, 3, 56, 84))["depth"].isfinite().all()


def test_a_run_that_is_killed_and_resumed_ends_bit_for_bit_the_same(command, uninterrupted, tmp_path):
    out = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-m", "moe3d", *command, "--out", str(out)], env=environment)
    victim = random.Random(time.time()).randrange(1, STEPS // 2)
    try:
        while not ((out / "checkpoint.pt").exists() and load_checkpoint(out / "checkpoint.pt")["step"] >= victim):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < load_checkpoint(out / "checkpoint.pt")["step"] < STEPS
    assert not (out / "head.safetensors").exists()

    assert main([*command, "--out", str(out), "--resume"]) == 0
    there, here = (load_checkpoint(folder / "checkpoint.pt") for folder in (uninterrupted, out))
    assert flat(there) == flat(here)
    assert "head.safetensors" in {file.name for file in out.iterdir()}


def flat(value, path=""):
    """A nested state as plain data by path, tensors as their bytes."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


@pytest.mark.parametrize(("part", "recipe"), [("decoder", "paper"), ("all", "best")])
def test_more_than_the_head_is_trained_on_images_and_loads_by_name(weights, tmp_path, part, recipe):
    out = tmp_path / "out"
    options = (
        f"--size 56x84 --frames 2 --steps 2 --workers 0 --lr 1e-3 --gate-hidden 8 --train {part} --recipe {recipe}"
    )
    options += " --precision bf16 --validation-scenes 1"
    assert main(["train", "--dataset", "synthetic", "--model", str(weights), "--out", str(out), *options.split()]) == 0
    before = load_mini(path=weights).state_dict()
    model = load_model(out / "model.safetensors", out / "head.safetensors")
    after = model.state_dict()
    changed = {
        name.split(".")[0] for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])
    }
    assert changed == {"depth_head", "camera_head"} | ({"aggregator"} if part == "all" else set())
    tail = patched_heads(model)["depth"].tail
    assert (tail.mode, tail.temperature, tail.sharpen) == (("mean", 0.5, 4) if recipe == "best" else ("mean", 0.5, 0))


def test_the_papers_datasets_are_trained_on_together_each_at_its_own_size(weights, tmp_path):
    """Written in their own formats; the two steps' batches are of different datasets."""
    roots = {name: CASES[name].written(tmp_path / name) for name in ("hypersim", "vkitti2")}
    split = roots["hypersim"] / "metadata_images_split_scene_v1.csv"
    split.write_text(split.read_text().replace(",test", ",train"))
    out = tmp_path / "out"
    options = "--size 56x84,28x98 --frames 2 --steps 2 --workers 1 --gate-hidden 8 --validation-scenes 0 --seed 1"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        take_step = Trainer._take_step

        def remember(self, shares):
            seen.extend((batch["names"][0][0].split("/")[0], tuple(batch["images"].shape[-2:])) for batch in shares)
            return take_step(self, shares)

        patch.setattr(Trainer, "_take_step", remember)
        datasets = ["--dataset", ",".join(roots), "--root", ",".join(map(str, roots.values()))]
        code = main(["train", *datasets, "--model", str(weights), "--out", str(out), *options.split()])
    assert code == 0 and (out / "head.safetensors").exists()
    assert set(seen) == {("hypersim", (56, 84)), ("vkitti2", (28, 98))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100x100"], "argument --size: height and width must be multiples of 14, got 100x100"),
        (["--size", "56x84,56x84"], "--size must give one size or one per dataset (1), got 2"),
        (["--root", "somewhere"], "--root must name 0 folder(s), one per dataset on disk, got 1"),
        (["--frames", "3-2"], "argument --frames: expected N or N-M with 1 <= N <= M, got '3-2'"),
        (["--steps", "0"], "argument --steps: expected an integer of at least 1, got '0'"),
        (["--lr", "-1"], "argument --lr: expected a number of at least 0, got '-1'"),
        (["--ema", "1"], "argument --ema: expected a number from 0 to 0.999999, got '1'"),
        (["--temperature", "0"], "argument --temperature: expected values above 0, got '0'"),
        (["--entropy-weight", "1:2"], "a schedule is VALUE or START:END:KIND[:PART]"),
        (["--loss", "nll-laplace", "--num-experts", "1"], "loss 'nll-laplace' needs at least 2 experts, got 1"),
        (["--image-gate", "plain", "--num-experts", "1"], "--image-gate plain needs at least 2 experts, got --num-exp"),
    ],
)
def test_wrong_usage_is_one_sentence(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main([*REQUIRED, *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_cannot_be_trained_is_told_in_one_sentence(capsys, tmp_path, weights, uninterrupted):
    command = ["train", "--dataset", "synthetic", "--model", str(weights), "--out"]
    cases = [
        ([*command, str(tmp_path / "new"), "--resume"], "there is no checkpoint to resume in"),
        ([*command, str(uninterrupted)], "checkpoint.pt exists: resume the run, or choose another folder"),
        (
            [*command, str(uninterrupted), "--resume", "--steps", "16", "--batch", "2", "--recipe", "best"],
            "is of a run with",
        ),
        (
            [
                *command,
                str(uninterrupted),
                *OPTIONS.split(),
                "--resume",
            ],
            "is of a run with cache_scenes = 3, and this one has None",
        ),
        ([*command, str(tmp_path), "--cache-features", "c", "--train", "all"], "train the head, not 'all'"),
        (
            ["train", "--dataset", "nowhere", "--root", "x", "--model", "mini", "--out", str(tmp_path / "a")],
            "'nowhere'",
        ),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

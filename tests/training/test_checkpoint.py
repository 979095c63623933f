"""The last good checkpoint survives whatever happens to the next one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from moe3d.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint


def run(code: str, *arguments) -> subprocess.Popen:
    program = "from moe3d.training.checkpoint import *\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_checkpoint_is_what_was_saved(tmp_path):
    state = {"step": 7, "model": {"w": torch.randn(3)}, "random": [random_state()], "unit": 0.1, "ema": None}
    save_checkpoint(tmp_path / "c.pt", state)
    found = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert {**found, "model": 0, "random": 0} == {**state, "model": 0, "random": 0}


def test_random_states_come_back():
    before = random_state()
    try:
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        restore_random_state(before)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    finally:
        restore_random_state(before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The file-size limit stands for the full disk: a real write fails half-way."""
    process = run(
        """
        import resource, signal, sys
        from pathlib import Path
        path = Path(sys.argv[1])
        save_checkpoint(path, {"step": 1, "w": torch.ones(1000)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(path, {"step": 2, "w": torch.ones(1_000_000)})
        except OSError as error:
            print(error)
        """,
        tmp_path / "c.pt",
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "the checkpoint of step 2 could not be written" in output
    assert f"the last one, {tmp_path / 'c.pt'}, is kept" in output
    assert load_checkpoint(tmp_path / "c.pt")["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_a_kill_while_writing_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    process = run(
        """
        import sys
        from pathlib import Path
        for step in range(1_000_000):
            save_checkpoint(Path(sys.argv[1]), {"step": step, "w": torch.full((500_000,), float(step))})
        """,
        path,
    )
    try:
        while not path.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(random.Random(int(time.time())).uniform(0, 0.1))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    state = load_checkpoint(path)
    assert (state["w"] == state["step"]).all()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1, "w": torch.ones(1000)})
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            load_checkpoint(path)


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"step": Malicious()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
    assert "executed" not in capsys.readouterr().out

"""Peak memory and first calls, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moe3d.benchmark import probe
from moe3d.benchmark.case import Case
from moe3d.benchmark.race import Unavailable
from moe3d.benchmark.session import Session
from moe3d.benchmark.tables import summary

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc, which only Linux has")
MEGABYTE = 1 << 20


@LINUX
def test_the_resident_peak_sees_what_comes_and_goes():
    """In a process of its own: other tests leave freed memory behind that an allocator would use first."""
    script = """
import torch
from moe3d.benchmark import probe
meter = probe._ResidentMeter()
before = meter.restart()
torch.ones(1 << 24)
print(meter.peak() - before, meter.restart() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, left = map(int, run.stdout.split())
    assert 63 * MEGABYTE <= peak < 80 * MEGABYTE  # the kernel counts in batches of pages
    assert left < 16 * MEGABYTE


@LINUX
def test_the_peak_of_a_peer_is_that_of_its_buffers():
    case = Case(1, 154, 154)
    upsampled, hidden = (4 * case.pixels * channels for channels in (case.channels, case.expert_hidden))
    measured = probe.peak_memory("tail", "stock, cached embedding", case)
    # Upsampled features, then with the embedding added; then the hidden layer beside these.
    assert upsampled + hidden < measured["peak_bytes"] < 3 * upsampled + hidden
    assert measured["seconds"] > 0


@pytest.mark.parametrize("script, message", [
    ("echo 'Traceback' >&2; echo 'Unavailable: there is no GPU' >&2; exit 1", "^Unavailable: there is no GPU$"),
    ("exit 7", "^exit code 7$"),
])  # fmt: skip
def test_a_probe_that_fails_says_why(script, message, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(probe.sys, "executable", str(program))
    with pytest.raises(probe.ProbeFailed, match=message):
        probe.peak_memory("tail", "cuda", Case(1, 28, 28))


def test_the_child_measures_what_it_is_asked(capsys, monkeypatch):
    case = json.dumps(Case(1, 28, 28).asdict())
    probe.main(["latency", "tail", "reference", case])
    measured = json.loads(capsys.readouterr().out)
    assert measured["first_s"] > 0 and measured["second_s"] > 0
    monkeypatch.setattr("moe3d.backends", lambda: {"reference": "it is on strike"})
    with pytest.raises(Unavailable, match="it is on strike"):
        probe.main(["memory", "tail", "reference", case])


def test_only_the_right_are_probed(wrong_backend, small_ceilings, monkeypatch):
    seconds = {"first_s": 2.0, "second_s": 0.5}
    monkeypatch.setattr("moe3d.benchmark.session.peak_memory", lambda *a: {"peak_bytes": 7, "seconds": 0.1})
    monkeypatch.setattr("moe3d.benchmark.session.first_call", lambda *a: {"cold": seconds, "warm": seconds})
    session = Session("cpu")
    for measure in (session.memory, session.latency):
        assert "wrong" in measure(Case(1, 28, 28), wrong_backend).refused
        assert measure(Case(1, 28, 28), "reference").times
    assert session.memory(Case(1, 28, 28), "reference", "training").times
    memory, latency, training = session.records
    assert (training.suite, training.peak_bytes) == ("training memory", 7)
    assert "a training step of the tail: forward, backward, AdamW, 28x28" in summary(session.records)
    assert (memory.suite, memory.peer, memory.peak_bytes) == ("memory", "reference", 7)
    assert latency.first_call_ms == {"cold": 2000.0, "warm": 2000.0} and latency.p50_ms == 500.0

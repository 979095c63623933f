"""``moe3d bench``."""

from __future__ import annotations

import json

import pytest

from moe3d.benchmark.records import Record
from moe3d.cli import main

TINY = ["bench", "--device", "cpu", "--size", "28x28", "--seconds", "0"]


@pytest.fixture(autouse=True)
def _quick(small_ceilings):
    """Tests of the command want no exact ceilings."""


def test_the_table(capsys):
    assert main([*TINY, "--frames", "1", "--experts", "2"]) == 0
    text = capsys.readouterr().out
    assert "28x28, 1 frame a call, K = 2, ieee, 3 interleaved rounds" in text
    assert "overhead of the mixture" in text and "GFLOPs +4.97% (the paper: +4.97%)" in text
    assert sum(line.startswith("reference") for line in text.splitlines()) == 2  # tail and whole model


def test_json_lines_are_records(capsys):
    assert main([*TINY, "--frames", "1,2", "--experts", "1", "--json"]) == 0
    records = [Record(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert {(r.suite, r.case["frames"]) for r in records} == {("tail", 1), ("tail", 2), ("mini", 1)}
    assert all(r.p50_ms > 0 and r.rounds == 3 for r in records)


def test_a_wrong_backend_is_left_out_and_the_command_fails(capsys, wrong_backend):
    assert main([*TINY, "--frames", "1", "--experts", "2"]) == 1
    out, err = capsys.readouterr()
    assert not any(line.startswith(wrong_backend) for line in out.splitlines())
    assert f"{wrong_backend} is left out, it was refused: wrong: relative RMS error" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "43x56"], "size must be multiples of 14, got 43x56"),
        (["--size", "0x14"], "size must be multiples of 14"),
        (["--size", "big"], "expected HxW, as 518x518, got 'big'"),
        (["--frames", "0"], "expected an integer of at least 1, got '0'"),
        (["--frames", "1,,2"], "expected an integer of at least 1, got ''"),
        (["--experts", "-1"], "expected an integer of at least 1, got '-1'"),
        (["--seconds", "nan"], "expected a number from 0 to 3600, got 'nan'"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_tf32_needs_a_gpu(capsys):
    assert main(["bench", "--device", "cpu", "--precision", "tf32"]) == 1
    assert "--precision tf32 is arithmetic of CUDA devices" in capsys.readouterr().err


def test_no_bfloat16_where_pytorch_has_no_convolutions_of_it(monkeypatch, capsys):
    monkeypatch.setattr("moe3d.cli.bench.precisions", lambda device: ("ieee",))
    assert main(["bench", "--device", "cpu", "--precision", "bf16"]) == 1
    assert "--precision bf16: PyTorch, with which it would be compared, has no such" in capsys.readouterr().err

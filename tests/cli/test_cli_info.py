"""``moe3d info``."""

from __future__ import annotations

import json
import platform

import pytest
import torch

import moe3d
from moe3d.cli import info, main
from moe3d.ops import dispatch


def test_json_has_the_documented_keys(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"version", "backends", "native", "torch", "triton", "python"}
    assert facts["version"] == moe3d.__version__
    assert facts["torch"] == torch.__version__ and facts["python"] == platform.python_version()
    assert set(facts["backends"]) == {"triton", "cuda", "cpu", "reference"}
    assert facts["backends"]["reference"] == {"available": True, "reason": None}
    for entry in (*facts["backends"].values(), facts["native"]):
        assert set(entry) == {"available", "reason"}
        assert entry["available"] == (entry["reason"] is None)
    for name, reason in moe3d.backends().items():
        assert facts["backends"][name]["reason"] == reason


@pytest.mark.parametrize(
    ("cpu", "cuda", "native"),
    [
        (None, "there is no GPU", {"available": True, "reason": None}),
        ("it was not built", None, {"available": True, "reason": None}),
        ("it was not built", "no GPU", {"available": False, "reason": "cpu: it was not built; cuda: no GPU"}),
    ],
)
def test_native_follows_the_backends_that_it_serves(monkeypatch, cpu, cuda, native):
    for name, reason in (("cpu", cpu), ("cuda", cuda)):
        monkeypatch.setattr(dispatch._REGISTRY[name], "unavailable", lambda reason=reason: reason)
    assert info.collect()["native"] == native


def test_text_says_which_backends_can_run_and_why_not(capsys, monkeypatch):
    monkeypatch.setattr(dispatch._REGISTRY["cuda"], "unavailable", lambda: "there is no GPU")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"moe3d {moe3d.__version__}"
    assert "  cuda       no: there is no GPU" in lines
    assert "  reference  yes" in lines
    assert info.platform_note(platform.system(), platform.machine()) in lines[2]


@pytest.mark.parametrize(
    ("system", "machine", "note"),
    [
        ("Linux", "x86_64", "Linux x86_64: supported"),
        ("Linux", "aarch64", "Linux aarch64: untested"),
        ("Linux", "riscv64", "Linux riscv64: the reference backend only"),
        ("Darwin", "arm64", "macOS arm64: the reference backend only"),
        ("Windows", "AMD64", "Windows AMD64: the reference backend only"),
    ],
)
def test_each_platform_is_told_what_it_gets(system, machine, note):
    assert info.platform_note(system, machine).startswith(note)

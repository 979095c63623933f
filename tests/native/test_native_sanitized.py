"""The kernels without Python (csrc/test/driver.cpp): under the sanitizers, and on an emulated aarch64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(target: str, *tools: str) -> subprocess.CompletedProcess:
    missing = [tool for tool in ("make", "cmake", "c++", *tools) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_the_kernels_are_clean_under_the_sanitizers():
    assert "all shapes agree" in make("native-sanitize").stdout


def test_aarch64_computes_what_this_machine_does():
    done = make("native-aarch64", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
    _, emulated = done.stdout.split("native_driver compare ")
    assert "all shapes agree" in emulated

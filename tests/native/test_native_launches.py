"""The host's side of the CUDA kernels' launches, on a runtime that is made up (csrc/test/launches.cpp)."""

from __future__ import annotations

import subprocess

import pytest

from support.emulator import CSRC, compiler


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_no_launch_disturbs_another(tmp_path):
    program = tmp_path / "launches"
    command = [compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", CSRC / "test" / "runtime"]
    subprocess.run([*command, CSRC / "test" / "launches.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.stdout == "launches: none disturbs another\n"

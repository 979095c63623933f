"""What MOE3D_BUILD and its relatives make setup.py do: stand-ins for nvcc, CMake and Ninja, and nothing compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "moe3d").is_dir(), reason="the package's sources are not here")
# It "builds" an empty module, fails where it is asked for what FAIL names, and writes down how it was called.
CMAKE = f"""#!{sys.executable}
import os, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if any(word and word in " ".join(sys.argv) for word in os.environ["FAIL"].split(",")):
    sys.exit("CMake Error: no such luck")
"""


@pytest.fixture
def tools(tmp_path):
    """A PATH with stand-ins; ``tools.run(...)`` builds, and gives back the process, the record and CMake's calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("cmake", CMAKE), ("nvcc", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "ninja.py").write_text("BIN_DIR = 'bin'\n")
    (folder / "pybind11.py").write_text("def get_cmake_dir():\n    return 'pybind11'\n")

    def run(fail: str = "", **variables: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE3D_", "CUDA"))}
        environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "FAIL": fail} | variables
        out = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
        command = [sys.executable, ROOT / "setup.py", "-q", "build_ext", *out]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        record = tmp_path / "lib" / "moe3d" / "_build.json"
        calls = folder / "calls"
        return (
            done,
            json.loads(record.read_text()) if record.is_file() else None,
            calls.read_text().splitlines() if calls.is_file() else [],
        )

    run.nvcc = folder / "nvcc"
    return run


def test_auto_builds_both_parts(tools):
    done, record, calls = tools()
    assert done.returncode == 0, done.stderr
    assert record == {"cpu": None, "cuda": None}
    assert "-DMOE3D_CUDA=ON" in calls[0] and f"-DCMAKE_CUDA_COMPILER={tools.nvcc}" in calls[0]
    assert "-DMOE3D_CUDA_ARCHS=80-real;90" in calls[0] and len(calls) == 2


def test_auto_without_nvcc_builds_the_cpu_part_and_says_so(tools):
    done, record, calls = tools(CUDACXX="/nowhere/nvcc")
    assert done.returncode == 0 and record["cpu"] is None and "no nvcc was found" in record["cuda"]
    assert not any("CUDA" in call for call in calls)


def test_auto_goes_on_without_a_cuda_part_that_fails(tools):
    done, record, _ = tools(fail="MOE3D_CUDA")
    assert done.returncode == 0 and "without the CUDA part" in done.stderr
    assert record == {"cpu": None, "cuda": "its build failed: cmake said: CMake Error: no such luck"}


def test_auto_goes_on_without_any_part(tools):
    done, record, _ = tools(fail="-S")
    assert done.returncode == 0 and all("no such luck" in reason for reason in record.values())


def test_cpu_leaves_cuda_out(tools):
    done, record, calls = tools(MOE3D_BUILD="cpu")
    assert done.returncode == 0 and record == {"cpu": None, "cuda": "it was built with MOE3D_BUILD=cpu"}
    assert not any("CUDA" in call for call in calls)


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_what_is_asked_for_must_succeed(tools, choice):
    done, record, _ = tools(MOE3D_BUILD=choice, fail="-S")
    assert done.returncode != 0 and record is None and "the native build failed: cmake said" in done.stderr


def test_cuda_without_nvcc_fails_at_once(tools):
    done, _, calls = tools(MOE3D_BUILD="cuda", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0 and "MOE3D_BUILD=cuda cannot be built: no nvcc was found" in done.stderr and not calls


@pytest.mark.parametrize(
    ("asked", "given"), [("9.0", "90"), ("90,80 86", "80-real;86-real;90"), ("100a;90", "90-real;100a")]
)
def test_architectures(tools, asked, given):
    _, _, calls = tools(MOE3D_CUDA_ARCHS=asked)
    assert f"-DMOE3D_CUDA_ARCHS={given}" in calls[0].split(" ")


@pytest.mark.parametrize("asked", ["75", "native", "80,x"])
def test_architectures_that_cannot_be(tools, asked):
    done, record, calls = tools(MOE3D_CUDA_ARCHS=asked)
    assert done.returncode != 0 and record is None and not calls
    assert f"MOE3D_CUDA_ARCHS must list compute capabilities from 8.0 on, like 80,90; got {asked!r}" in done.stderr


def test_an_unknown_choice(tools):
    done, _, _ = tools(MOE3D_BUILD="fast")
    assert done.returncode != 0 and "MOE3D_BUILD must be one of auto, cpu, cuda, off, got 'fast'" in done.stderr

"""What MOE3D_BUILD and its relatives make setup.py do: stand-ins for nvcc, CMake and Ninja, and nothing compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "moe3d").is_dir(), reason="the package's sources are not here")
NATIVE = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
# It "builds" an empty module, fails where it is asked for what FAIL names, and writes down how it was called.
CMAKE = f"""#!{sys.executable}
import os, pathlib, sys
OUT = "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if any(word and word in " ".join(sys.argv) for word in os.environ["FAIL"].split(",")):
    sys.exit(os.environ["SAYS"])
for folder in (word[len(OUT):] for word in sys.argv if word.startswith(OUT)):
    pathlib.Path(folder, "{NATIVE}").touch()
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

    def setup(root: Path, *arguments, fail: str = "", **variables: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE3D_", "CUDA"))}
        environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "FAIL": fail}
        environment |= {"SAYS": "CMake Error: no such luck"} | variables
        command = [sys.executable, root / "setup.py", "-q", *arguments]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    def run(fail: str = "", **variables: str):
        out = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
        done = setup(ROOT, "build_ext", *out, fail=fail, **variables)
        record = tmp_path / "lib" / "moe3d" / "_build.json"
        calls = folder / "calls"
        return (
            done,
            json.loads(record.read_text()) if record.is_file() else None,
            calls.read_text().splitlines() if calls.is_file() else [],
        )

    run.nvcc = folder / "nvcc"
    run.folder = folder
    run.setup = setup
    return run


@pytest.fixture
def checkout(tmp_path):
    """The smallest one that setup.py can build: what an editable install writes must not reach the true one."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for package in ("moe3d", "kernels"):
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    shutil.copy(ROOT / "moe3d" / "_version.py", root / "moe3d")
    return root


def _record(package: Path) -> dict:
    return json.loads((package / "_build.json").read_text())


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


SAID = {
    "CMake Error at CMakeLists.txt:2 (project):\n  No CMAKE_CXX_COMPILER could be found.\n\n  Tell CMake where": (
        "No CMAKE_CXX_COMPILER could be found."
    ),
    "CMake Error at CMakeLists.txt:50 (find_package):\n\n  By not providing ...": "By not providing ...",
    "-- Performing Test HAS_ERRORS\n-- The error of old\na.cpp:3:1: error: no\nninja: build stopped": (
        "a.cpp:3:1: error: no"
    ),
    "c++: fatal error: out of memory\n1 error": "c++: fatal error: out of memory",
    "-- Performing Test HAS_ERRORS - Success\nKilled": "Killed",
    "CMake Error at CMakeLists.txt:2 (project):": "CMake Error at CMakeLists.txt:2 (project):",
}


@pytest.mark.parametrize(("said", "telling"), SAID.items())
def test_the_reason_is_what_went_wrong_and_not_where(tools, said, telling):
    _, record, _ = tools(fail="-S", SAYS=said, CUDACXX="/nowhere/nvcc")
    assert record["cpu"] == f"its build failed: cmake said: {telling}"


@pytest.mark.parametrize("name", ["ninja", "pybind11"])
def test_a_tool_that_is_not_installed_is_a_reason_like_any(tools, name):
    (tools.folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module', name={name!r})\n")
    done, record, calls = tools()
    assert done.returncode == 0 and set(record.values()) == {f"its build failed: {name} is not installed"}
    done, _, _ = tools(MOE3D_BUILD="cpu")
    assert done.returncode != 0 and f"the native build failed: {name} is not installed" in done.stderr and not calls


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_has_the_record_of_its_last_build(tools, checkout, tmp_path, mode):
    package = checkout / "moe3d"
    anothers = package / "_native.cpython-01-elsewhere.so"
    anothers.touch()
    # strict: a tree of links is installed; lenient: the checkout itself
    edit = ("editable_wheel", "--mode", mode, "--dist-dir", tmp_path / "dist")

    done = tools.setup(checkout, *edit, MOE3D_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert (package / NATIVE).is_file() and _record(package)["cpu"] is None

    done = tools.setup(checkout, *edit, fail="-S")  # as without a compiler
    assert done.returncode == 0, done.stderr
    assert not (package / NATIVE).exists() and "no such luck" in _record(package)["cpu"]

    tools.setup(checkout, *edit, MOE3D_BUILD="cpu")
    done = tools.setup(checkout, *edit, MOE3D_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert not (package / NATIVE).exists() and _record(package)["cpu"] == "it was built with MOE3D_BUILD=off"
    assert anothers.exists()  # another Python's


def test_a_module_that_is_gone_is_not_built_again_from_an_earlier_build(tools, checkout, tmp_path):
    package = tmp_path / "lib" / "moe3d"
    build = ("build", "--build-lib", package.parent, "--build-temp", tmp_path / "temp")
    gone = checkout / "moe3d" / "gone.py"
    gone.touch()
    done = tools.setup(checkout, *build, MOE3D_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert (package / "gone.py").exists() and (package / NATIVE).exists()

    gone.unlink()
    done = tools.setup(checkout, *build, MOE3D_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert not (package / "gone.py").exists() and (package / NATIVE).exists() and _record(package)["cpu"] is None

    done = tools.setup(checkout, *build, MOE3D_BUILD="off")
    assert done.returncode == 0, done.stderr
    left = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert left == {"__init__.py", "_version.py", "kernels/__init__.py", "_build.json"}

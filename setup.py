"""What pyproject.toml cannot say: kernels/ is installed as moe3d.kernels, and CMake builds csrc/ into moe3d._native.

MOE3D_BUILD chooses what is built: "auto" (the default: what can be, and a record of what could not), "cpu" (C++ alone)
or "cuda" (C++ and CUDA; both fail where that cannot be built), "off" (pure Python). CUDA needs nvcc, which CUDACXX may
name; MOE3D_CUDA_ARCHS says for which compute capabilities. No build needs PyTorch or looks for a GPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "cpu", "cuda", "off")
CUDA_ARCHS = "80,90"  # by default; the newest one also as PTX, which newer GPUs compile for themselves
RECORD = "_build.json"
NO_NVCC = "no nvcc was found (named by CUDACXX, in CUDA_HOME, on PATH, or in /usr/local/cuda)"


def choice() -> str:
    value = os.environ.get("MOE3D_BUILD", "auto")
    if value not in CHOICES:
        raise SystemExit(f"MOE3D_BUILD must be one of {', '.join(CHOICES)}, got {value!r}")
    if value == "cuda" and nvcc() is None:
        raise SystemExit(f"MOE3D_BUILD=cuda cannot be built: {NO_NVCC}")
    return value


def nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cuda_archs() -> str:
    """MOE3D_CUDA_ARCHS ("80,90", or "8.0 9.0") in CMake's words: code for each, PTX for the newest."""
    asked = os.environ.get("MOE3D_CUDA_ARCHS") or CUDA_ARCHS
    archs = [word.replace(".", "") for word in re.split(r"[,; ]+", asked.strip())]
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) and int(arch.rstrip("af")) >= 80 for arch in archs):
        raise SystemExit(
            f"MOE3D_CUDA_ARCHS must list compute capabilities from 8.0 on, like {CUDA_ARCHS}; got {asked!r}"
        )
    archs.sort(key=lambda arch: (int(arch.rstrip("af")), arch))
    return ";".join([*(f"{arch}-real" for arch in archs[:-1]), archs[-1]])


def write_record(package: Path, cpu: str | None, cuda: str | None) -> None:
    """What was left out and why, for `moe3d info` (moe3d/_build.py reads it)."""
    (package / RECORD).write_text(json.dumps({"cpu": cpu, "cuda": cuda}) + "\n")


def remove_native(package: Path) -> None:
    """An earlier build's module for this Python: an editable install leaves it in the checkout."""
    for suffix in EXTENSION_SUFFIXES:
        (package / f"_native{suffix}").unlink(missing_ok=True)


class BuildFailure(Exception):
    """A step of the native build failed; the message is one line."""


class BuildNative(build_ext):
    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        module.unlink(missing_ok=True)  # an earlier build's must not stand in for one that fails
        cpu = cuda = None
        if CHOICE == "cpu":
            cuda = "it was built with MOE3D_BUILD=cpu"
        elif nvcc() is None:
            cuda = NO_NVCC
        if cuda is None:
            cuda = self.attempt(module, "CUDA")
        if cuda is not None:
            cpu = self.attempt(module)
        write_record(module.parent, cpu=cpu, cuda=cuda)

    def copy_extensions_to_source(self):
        """For an editable install: setuptools would copy no record, and fail where there is no module."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            module = Path(self.get_ext_fullpath(ext.name))
            remove_native(module.parent)  # first: to write over a file in use could crash the process that loaded it
            if built.exists():
                shutil.copy2(built, module)
            shutil.copy2(built.parent / RECORD, module.parent)

    def attempt(self, module: Path, *parts: str) -> str | None:
        """Builds the C++ part and those named; why not, where a build may go on without."""
        try:
            self.cmake(module, *parts)
        except BuildFailure as failure:
            if CHOICE != "auto":
                raise SystemExit(f"moe3d: the native build failed: {failure}") from failure
            print(f"moe3d: going on without the {parts[0] if parts else 'C++'} part: {failure}", file=sys.stderr)
            return f"its build failed: {failure}"
        return None

    def cmake(self, module: Path, *parts: str) -> None:
        try:
            import ninja
            import pybind11
        except ImportError as error:  # pip brings them, but not with --no-build-isolation
            raise BuildFailure(f"{error.name} is not installed") from error
        build = Path(self.build_temp).resolve() / "-".join(("cpu", *(part.lower() for part in parts)))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-G", "Ninja", "-S", ROOT / "csrc", "-B", build),
            f"-DMOE3D_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # pip's last build environment, which the cache remembers, is gone
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]
        if "CUDA" in parts:
            configure += ["-DMOE3D_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}", f"-DMOE3D_CUDA_ARCHS={cuda_archs()}"]
        run(configure)
        run(["cmake", "--build", build])

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]  # the module may have been left out

    def get_output_mapping(self):
        return {path: source for path, source in super().get_output_mapping().items() if Path(source).exists()}


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:
            self.remove_leftovers()
        super().run()
        if CHOICE == "off":
            package = Path(self.get_package_dir("moe3d") if self.editable_mode else Path(self.build_lib, "moe3d"))
            reason = "it was built with MOE3D_BUILD=off"
            remove_native(package)
            write_record(package, cpu=reason, cuda=reason)

    def remove_leftovers(self) -> None:
        """What an earlier build left and this one has not: all that lies in the build folder would be installed.

        That goes for the native module and the record, too, which this build writes later.
        """
        ours = {Path(path).resolve() for path in self.get_outputs(include_bytecode=False)}
        for path in Path(self.build_lib, "moe3d").resolve().rglob("*"):
            if path.is_file() and path not in ours:
                path.unlink()


def run(command: list) -> None:
    try:
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildFailure(f"{command[0]} cannot be run ({error.strerror})") from error
    print(done.stdout)
    if done.returncode != 0:
        raise BuildFailure(f"{command[0]} said: {telling_line(done.stdout)}")


def telling_line(output: str) -> str:
    """The first error of CMake or of a compiler, or the last line; CMake says where before it says what.

    An error is the word: "-- Performing Test HAS_ERRORS" tells of none.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [""]
    wrong = (i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.I) and not line.startswith("--"))
    at = next(wrong, len(lines) - 1)
    only_where = re.fullmatch(r"CMake Error (at|in) .*:", lines[at])  # "... at CMakeLists.txt:2 (project):"
    return lines[at + 1] if only_where and at + 1 < len(lines) else lines[at]


CHOICE = choice()

setup(
    packages=[*find_packages(include=["moe3d", "moe3d.*"]), "moe3d.kernels"],
    package_dir={"moe3d.kernels": "kernels"},
    ext_modules=[] if CHOICE == "off" else [Extension("moe3d._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)

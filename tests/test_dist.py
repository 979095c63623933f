"""What the sdist and the wheel hold: all that a build and its tests need, and nothing that lay about in the checkout.

By default both are built here, the wheel from the sdist and as pure Python, which takes no compiler; MOE3D_DIST names a
folder with finished ones instead (`make dist`). Nothing here needs PyTorch.
"""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "moe3d.egg-info/")
NOT_SHIPPED = (".ci/", ".gitignore")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    finished = os.environ.get("MOE3D_DIST")
    if finished:
        return Path(finished)
    pytest.importorskip("build", reason="needs the extra `dev`")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, *"-m build --no-isolation --skip-dependency-check --outdir".split(), folder, ROOT],
        env=os.environ | {"MOE3D_BUILD": "off"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def sdist(dist) -> set[str]:
    """The files of the sdist, relative to its one folder."""
    (path,) = dist.glob("moe3d-*.tar.gz")
    with tarfile.open(path) as archive:
        names = [member.name for member in archive if member.isfile()]
    folder = path.name.removesuffix(".tar.gz") + "/"
    assert all(name.startswith(folder) for name in names)
    return {name.removeprefix(folder) for name in names}


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("moe3d-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def _tracked() -> set[str]:
    """What git knows, or would be told of by `git add .`: nothing that it ignores."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout: there is no list of its files to compare with")
    return {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}


def test_the_sdist_is_the_checkout(sdist):
    ours = {name for name in sdist if not name.startswith(MADE_BY_SETUPTOOLS)}
    assert ours == {name for name in _tracked() if not name.startswith(NOT_SHIPPED)}


def test_the_sdist_has_what_building_and_testing_need(sdist):
    for folder in ("bench", "csrc", "docs", "examples", "kernels", "moe3d", "tests"):
        shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*") if _is_source(path)}
        shipped.discard("moe3d/_build.json")  # an editable install writes it
        assert shipped <= sdist
    assert {"LICENSE", "Makefile", "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py"} <= sdist


def _is_source(path: Path) -> bool:
    return path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py", ".md", ".json", ".html", ".map", ".txt")


def test_the_wheel_is_the_package_and_nothing_else(sdist, wheel):
    package = {name for name in sdist if name.startswith("moe3d/")}
    package |= {f"moe3d/{name}" for name in sdist if name.startswith("kernels/")}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert package <= found
    built = found - package - {"moe3d/_build.json"}
    native = "-none-any" not in Path(wheel.filename).name
    assert [name.split(".")[0] for name in built] == ["moe3d/_native"] * native


def test_the_wheel_has_its_licence_and_says_so(wheel, metadata):
    (licence,) = (name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "moe3d = moe3d.cli:main" in wheel.read(licence.replace("licenses/LICENSE", "entry_points.txt")).decode()


def test_the_version_comes_from_one_place(wheel, metadata):
    namespace: dict = {}
    exec(wheel.read("moe3d/_version.py"), namespace)
    assert metadata["Version"] == namespace["__version__"]
    assert Path(wheel.filename).name.startswith(f"moe3d-{metadata['Version']}-")
    literal = f'"{metadata["Version"]}"'.encode()
    assert [name for name in wheel.namelist() if literal in wheel.read(name)] == ["moe3d/_version.py"]


def test_the_metadata_names_the_pythons_that_were_shown(metadata):
    classifiers = metadata.get_all("Classifier")
    prefix = "Programming Language :: Python :: 3."
    assert tuple(c.removeprefix(prefix[:-2]) for c in classifiers if c.startswith(prefix)) == PYTHONS
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"

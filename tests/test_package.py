"""The package as installed, and as imported from a checkout."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import moe3d

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("moe3d")
    except importlib.metadata.PackageNotFoundError:
        return None


def test_version_comes_from_one_place():
    installed = _installed_version()
    if installed is None:
        pytest.skip("moe3d is not installed: nothing to compare the checkout's version with")
    assert installed == moe3d.__version__


def test_what_is_tested_is_the_wheel_where_one_is_named():
    dist = os.environ.get("MOE3D_DIST")
    if dist is None:
        pytest.skip("MOE3D_DIST names no finished wheel (make test-dist)")
    installed = Path(moe3d.__file__).parents[1]
    assert installed in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
    (wheel,) = Path(dist).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.startswith("moe3d/")]
        assert all(archive.read(name) == (installed / name).read_bytes() for name in files)
    assert Path(_python("import moe3d; print(moe3d.__file__)", ROOT)) == Path(moe3d.__file__)


def test_imports_in_the_repository_root_where_the_checkout_shadows_the_installed_package():
    if not (ROOT / "moe3d").is_dir():
        pytest.skip("these tests stand alone, without the package's sources beside them")
    folder = Path(_python("import moe3d; print(moe3d.__path__[0])", ROOT))
    assert folder == ROOT / "moe3d"
    assert Path(_python("import moe3d.kernels as k; print(k.__path__[0])", ROOT)) == ROOT / "kernels"


def test_imports_elsewhere(tmp_path):
    if _installed_version() is None:
        pytest.skip("moe3d is not installed: nothing to import outside the checkout")
    package, kernels = _python(
        "import moe3d, moe3d.kernels as k; print(moe3d.__path__[0], k.__path__[0])", tmp_path
    ).split()
    assert Path(kernels) in (Path(package) / "kernels", ROOT / "kernels")  # the latter in an editable install


def test_kernels_are_not_installed_under_a_name_of_their_own():
    # Only an installed distribution has a RECORD; the egg-info that a build leaves in a checkout lists the sources.
    files = next((d.files for d in importlib.metadata.distributions(name="moe3d") if d.read_text("RECORD")), None)
    if not files:
        pytest.skip("moe3d is not installed: there is no list of its files")
    top_level = {file.parts[0] for file in files if file.suffix == ".py" and ".." not in file.parts}
    assert not top_level & {"kernels", "bench", "tests", "csrc"}


def test_public_names_exist():
    names = ("patch_vggt", "unpatch_vggt", "save_head", "load_head", "load_mini", "MoEHead", "moe_head", "backends")
    for name in names:
        assert callable(getattr(moe3d, name))

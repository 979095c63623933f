"""The end of a test run says how many tests the real ``vggt`` package is missing for, and `make test-real` insists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import moe3d

TESTS = Path(__file__).parent


def test_skips_are_counted_and_may_be_forbidden(tmp_path):
    (tmp_path / "vggt.py").write_text("raise ImportError('not the real one')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(moe3d.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "MOE3D_NO_SKIPS": "1"}
    command = [sys.executable, *"-m pytest -q -p no:cacheprovider test_position.py -k".split(), "real or columns"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    line = "6 tests skipped because the real `vggt` package cannot be imported, and MOE3D_NO_SKIPS=1 forbids that"
    assert line in done.stdout.splitlines()
    assert "1 passed, 6 skipped" in done.stdout

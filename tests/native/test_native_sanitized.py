"""The kernels without Python, under AddressSanitizer and UndefinedBehaviorSanitizer (csrc/test/driver.cpp)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [tool for tool in ("make", "cmake", "c++") if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
def test_the_kernels_are_clean_under_the_sanitizers():
    done = subprocess.run(["make", "native-sanitize"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "all shapes agree" in done.stdout

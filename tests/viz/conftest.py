"""A small report, as the demo writes it; a browser to look at pages."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from moe3d.viz.comparison import encode_picture
from moe3d.viz.page import PageScene

HEIGHT, WIDTH = 40, 60


def _heads(abs_rel, delta1, si_f1, flying_rate):
    keys = ("abs_rel", "delta1", "si_f1", "flying_rate")
    return {
        head: dict(zip(keys, values, strict=True))
        for head, values in zip(("stock", "moe"), zip(abs_rel, delta1, si_f1, flying_rate, strict=True), strict=True)
    }


@pytest.fixture(scope="module")
def start_chromium():
    """A function that starts a headless Chromium with more arguments; skips where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium to drive a browser")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    started = []

    def start(*arguments):
        options = selenium.ChromeOptions()
        options.binary_location = binary
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *arguments):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        started.append(selenium.Chrome(options=options, service=selenium.ChromeService(executable_path=driver)))
        return started[-1]

    yield start
    for chrome in started:
        chrome.quit()


@pytest.fixture(scope="session")
def small_report():
    """``(report, scenes)`` for ``render_page``: two scenes, of which the second defines no boundary metric."""
    report = {
        "scenes": [
            {
                "name": "one",
                **_heads((0.1, 0.2), (0.9, 0.95), (0.3, 0.301), (0.5, 0.25)),
                "truth_flying_rate": 0.125,
                "views": 2,
                "size": [50, 75],
                "model_size": [HEIGHT, WIDTH],
            },
            {
                "name": "two",
                **_heads((0.3, 0.2), (0.5, 0.5), (None, None), (None, None)),
                "truth_flying_rate": None,
                "views": 2,
                "size": [50, 75],
                "model_size": [HEIGHT, WIDTH],
            },
        ],
        "mean": _heads((0.2, 0.2), (0.7, 0.725), (0.3, 0.301), (0.5, 0.25)),
        "overhead_percent": 12.3,
        "timing": {
            "interval_percent": [11.0, 13.0],
            "stock_seconds": 0.5,
            "moe_seconds": 1.25,
            "sharpened_seconds": 1.75,
            "rounds": 5,
            "views": 2,
            "size": [HEIGHT, WIDTH],
        },
        "backend": "reference",
        "device": "x86_64 CPU, 1 thread",
        "parameters": 4_243_092,
        "version": "1.2.3",
    }
    return report, [_scene("First <one>"), _scene("Second")]


def _scene(title):
    rng = np.random.default_rng(0)
    names = ["input", "depth_truth", "gate", "entropy", "detail_input", "detail_truth"]
    names += [
        f"{what}_{head}" for what in ("depth", "error", "flying", "points", "detail") for head in ("stock", "moe")
    ]
    pictures = {}
    for name in names:
        flat = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (HEIGHT, WIDTH, 3))
        pictures[name] = encode_picture(name, np.ascontiguousarray(flat))[1]
    weights = np.broadcast_to(np.array([0.95, 0.05, 0, 0])[:, None, None], (4, HEIGHT, WIDTH))
    return PageScene(
        title=title,
        about="a scene of a test",
        pictures=pictures,
        depth_range=(1.0, 4.0),
        weights=weights,
        downloads={"points_moe.glb": "one/points_moe.glb"},
    )

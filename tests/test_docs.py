"""The documentation builds, without a broken link; the examples run; the project's own files agree with each other."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moe3d
from moe3d.data import DATASETS
from moe3d.data.folder import FolderDataset
from moe3d.data.synthetic import render_scene
from support.models import real

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORTER = {"train_the_head": ["--steps", "2"], "own_dataset": ["--help"]}
CARD = Path(moe3d.__file__).parent / "models/weights/MODEL_CARD.md"  # the package may be an installed one
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "bench").glob("*.md")), CARD]
SITE = sorted((ROOT / "docs").rglob("*.md"))  # whose links to files are checked where the site is built
LINK = r"\]\(([^)\s]+)[^)]*\)"


def _run(command: list, cwd: Path) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs_autorefs", reason="needs the extra `docs`")
    pytest.importorskip("material", reason="needs the extra `docs`")
    _run(["-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"], ROOT)
    pages = {page: page.read_text() for page in (tmp_path / "site").rglob("index.html")}
    assert "nats" in pages[tmp_path / "site" / "reference" / "head" / "index.html"]  # docstrings are there
    raw = {str(page): mark for page, text in pages.items() for mark in (":func:", "``", "&lt;autoref") if mark in text}
    assert not raw  # their roles are links, and their markup is read as such


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    assert _run([example, *SHORTER.get(example.stem, [])], tmp_path).strip()


def test_a_dataset_of_ones_own_is_evaluated(tmp_path):
    scene = render_scene(0, (70, 84), frames=1)
    for kind, pixels in (("image", scene.images[0].permute(1, 2, 0) * 255), ("depth", scene.depth[0] * 1000)):
        (tmp_path / "root/room" / kind).mkdir(parents=True)
        picture = pixels.numpy().astype(np.uint8 if kind == "image" else np.uint16)
        Image.fromarray(picture).save(tmp_path / "root/room" / kind / "0001.png")
    command = [ROOT / "examples/own_dataset.py", "eval", "depth", "--dataset", "mine", "--root", tmp_path / "root"]
    assert "abs_rel" in _run(command, tmp_path)


def test_the_table_of_datasets_is_the_registrys():
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (yes|no) \| ([\w, ]*?) ?\| (.+) \|$", (ROOT / "docs/reference/data.md").read_text(), re.M
    )
    assert sorted(name for name, *_ in rows) == sorted(DATASETS)
    for name, poses, parts, depth in rows:
        module, factory = DATASETS[name].split(":")
        dataset = getattr(import_module(module), factory)
        assert dataset.has_poses == (poses == "yes"), name
        assert dataset.max_depth == (math.inf if depth == "all" else float(depth.removeprefix("< "))), name
        if issubclass(dataset, FolderDataset):
            assert dataset.splits == tuple(parts.split(", ") if parts else ()), name


@pytest.mark.real_vggt
def test_the_readmes_ten_lines_run(vggt_loader, tmp_path, monkeypatch):
    """As they stand, but for the weights, which are small and random."""
    from vggt.models.vggt import VGGT

    monkeypatch.setattr(VGGT, "from_pretrained", staticmethod(lambda name: real()))
    monkeypatch.chdir(tmp_path)
    for name in ("left.png", "right.png"):
        Image.effect_noise((56, 42), 50).convert("RGB").save(name)
    (lines,) = re.findall(r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    here: dict = {}
    exec(lines, here)
    assert len([line for line in lines.splitlines() if line]) == 10
    assert here["predictions"]["depth_entropy"].shape == here["predictions"]["depth"].shape[:-1]
    assert moe3d.load_head(real(), "head.safetensors").depth_head.tail.num_experts == here["tail"].num_experts


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page):
    targets = [target.partition("#")[0] for target in re.findall(LINK, page.read_text()) if "://" not in target]
    places = (page.parent, Path(moe3d.__file__).parents[1])  # the latter as CARD
    assert not [target for target in targets if not any((place / target).exists() for place in places)]


@pytest.mark.parametrize("page", [*PAGES, *SITE], ids=lambda path: path.name)
def test_links_to_the_web_are_whole(page):
    """Nothing here can follow them: each names a server by https, and a place there or the server itself."""
    targets = re.findall(LINK, page.read_text()) + re.findall(r"<(\w+:[^>]*)>", page.read_text())
    for target in (target for target in targets if ":" in target or target.startswith(("www.", "//"))):
        assert re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./~%+#?=&-]*)?", target), target


def test_the_changelog_and_the_citation_name_this_version():
    assert f"## {moe3d.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {moe3d.__version__}\n" in (ROOT / "CITATION.cff").read_text()

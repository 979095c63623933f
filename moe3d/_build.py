"""The compiled module ``moe3d._native`` and the record of its build: where they are, and why not where they are not.

Nothing here fails at import. A package built without its C++ part works, slower, and this module says why.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from moe3d._version import __version__

RECORD = "_build.json"  # written by setup.py into the package: {"cpu": null or a reason, "cuda": null or a reason}
_PACKAGE = Path(__file__).parent


class Native(NamedTuple):
    module: ModuleType | None
    reason: str | None  # why there is no module, in words that follow "because"


@functools.cache
def native() -> Native:
    """Loads the compiled module, once."""
    names = (f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)  # this interpreter's; there may be another's, too
    path = next((path for path in map(_find, names) if path), None)
    if path is None:
        reason = record()["cpu"] or "moe3d was not built for this Python"
        return Native(None, f"its C++ part is not installed ({reason})")
    try:
        module = _load(path)
    except ImportError as error:
        return Native(None, f"its C++ part {path.name} could not be loaded: {error}")
    if module.version != __version__:
        return Native(
            None,
            f"its C++ part was built for moe3d {module.version} and this is {__version__}: run `pip install .` again",
        )
    return Native(module, None)


def _load(path: Path) -> ModuleType:
    loader = ExtensionFileLoader("moe3d._native", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def record() -> dict[str, str | None]:
    """What the build left out and why: a reason for each of "cpu" and "cuda", None for what was built."""
    path = _find(RECORD)
    if path is None:
        reason = "this is a source folder without an installed moe3d: run `pip install .`"
        return {"cpu": reason, "cuda": reason}
    return json.loads(path.read_text())


def _find(name: str) -> Path | None:
    """A file of the package: beside this one, or in the installed distribution.

    Python started in the repository's root imports the source folder, which has no compiled module, also where moe3d is
    installed.
    """
    beside = _PACKAGE / name
    if beside.is_file():
        return beside
    if (_PACKAGE / RECORD).is_file():
        return None  # this is an installed package, and its build left it out: another one's is not meant for it
    files = (f for found in distributions(name="moe3d") for f in found.files or [])
    installed = (Path(f.locate()) for f in files if f.parent.name == "moe3d" and f.name == name)
    return next((path for path in installed if path.is_file()), None)

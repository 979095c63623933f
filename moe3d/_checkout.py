"""Lets ``moe3d.kernels`` be imported from a checkout, where the folder stands beside ``moe3d/`` and not inside it.

An installed package has it inside (setup.py maps it there), but Python started in the repository's root imports the
checkout's ``moe3d/`` even where the package is installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).parent
_KERNELS = _PACKAGE.parent / "kernels"


class _KernelsFinder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "moe3d.kernels":
            return None
        return spec_from_file_location(name, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)])


def install_finder() -> None:
    """Does nothing for an installed package."""
    if not (_PACKAGE / "kernels").is_dir() and (_KERNELS / "__init__.py").is_file():
        sys.meta_path.append(_KernelsFinder)

"""Instruction sets of the C++ part on this machine."""

from __future__ import annotations

from moe3d import _build


def isas() -> list[str]:
    """Those that this build has and this processor runs, but for ``amx``: ``avx512`` with other bfloat16 products."""
    module = _build.native().module
    return [name for name in module.supported_isas() if name != "amx"] if module else []


def bf16_isas() -> list[str]:
    """Those that multiply in bfloat16."""
    module = _build.native().module
    return [name for name in module.supported_isas() if module.has_bf16_products(name)] if module else []

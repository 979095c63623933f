"""Types of arguments that several commands have: each takes the text and gives the value, or says what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def integer(at_least: int = 1, at_most: float = math.inf, multiple_of: int = 1) -> Callable[[str], int]:
    limits = f"of at least {at_least}" if at_most == math.inf else f"from {at_least} to {at_most}"
    wanted = f"an integer {limits}" if multiple_of == 1 else f"a positive multiple of {multiple_of}"
    return _number(int, lambda value: at_least <= value <= at_most and value % multiple_of == 0, wanted)


def number(at_least: float = 0.0, at_most: float = math.inf) -> Callable[[str], float]:
    limits = f"of at least {at_least:g}" if at_most == math.inf else f"from {at_least:g} to {at_most:g}"
    return _number(float, lambda value: at_least <= value <= at_most, f"a number {limits}")


def positive() -> Callable[[str], float]:
    return _number(float, lambda value: value > 0, "a number above 0")


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got an empty string")
    return Path(text)


def _number(kind: Callable[[str], Any], allowed: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse

"""Ctrl-C while the command line is still importing PyTorch, which takes a second: one line and exit code 130.

Importing the package comes before any of the command line's own code, so this module, one of the first that the package
imports, acts on being imported: only in the program ``moe3d`` and in ``python -m moe3d``. :func:`moe3d.cli.main` then
takes over.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import NoReturn


def _is_command_line() -> bool:
    if sys.argv[0] == "-m":  # until Python has found the module, whose own name then takes its place
        # It stands before the module's own arguments, and may be joined to the option: -m moe3d, -um moe3d, -mmoe3d.
        return re.fullmatch(r"(-[A-Za-z]*m)?moe3d", sys.orig_argv[-len(sys.argv)]) is not None
    return os.path.basename(sys.argv[0]) == "moe3d"


def _leave(signum, frame) -> NoReturn:
    # Not by an exception, which compiled modules may swallow while they are imported; nothing is open yet.
    os.write(2, b"moe3d: interrupted\n")
    os._exit(130)


if _is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)


def take_over() -> None:
    """From here on SIGINT is a KeyboardInterrupt again, so that what is unfinished can be removed."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)

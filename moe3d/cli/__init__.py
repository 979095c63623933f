"""The command line: ``moe3d COMMAND ...``, and the same as ``python -m moe3d COMMAND ...``.

A command is a module of this folder with ``add_arguments(parser)`` and ``run(args)``, and one line in ``COMMANDS``.
Only the module of the command that is asked for is imported. ``run`` returns when all is done and raises otherwise:
:func:`main` is the one place that turns an exception into a sentence on standard error and an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NoReturn

from moe3d._startup import take_over
from moe3d._version import __version__

COMMANDS = {  # module of this folder -> what it does, for the list of commands and its own help
    "demo": "run the shipped model on a real and on synthetic scenes, stock head beside MoE head, and write a report",
    "reconstruct": "turn photographs or a video into depth, cameras and point clouds, with the experts that made them",
    "view": "look at reconstructions in the browser: points by colour, depth, expert, entropy or error",
    "train": "fine-tune a mixture-of-experts depth head, or more of a model, on datasets with ground truth",
    "eval": "judge depth, boundaries or point clouds against ground truth by published protocols, and write a report",
    "bench": "time the head on this machine: every backend against the stock head, each checked before it is timed",
    "info": "show versions, and which backends can run on this machine or why not",
}

DONE, FAILED, INTERRUPTED, TERMINATED = 0, 1, 130, 143  # wrong usage is argparse's 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None for this process's own.

    Returns:
        The exit code: 0 when done, 1 when anything failed, 130 after SIGINT, 143 after SIGTERM.

    Raises:
        SystemExit: wrong usage (code 2), ``--help`` and ``--version`` (code 0), as argparse does.
    """
    args = None
    try:
        _be_lenient_with_output()
        with _termination_unwinds():
            args = _parse(sys.argv[1:] if argv is None else list(argv))
            take_over()
            args.run(args)
            sys.stdout.flush()
        return DONE
    except KeyboardInterrupt as interrupt:
        return _report(args, "interrupted", INTERRUPTED, interrupt)
    except _Terminated as terminated:
        return _report(args, "terminated", TERMINATED, terminated)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not stumble over it again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _report(args, _sentence(error), FAILED, error)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _be_lenient_with_output() -> None:
    """Lines appear at once in a log, too; a path that the terminal cannot show is escaped instead of an error; and what
    a process without standard streams says goes nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


class _Terminated(BaseException):
    """SIGTERM, raised where the program was, so that everything unfinished is removed on the way out."""


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    def terminate(signum, frame):
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="moe3d", description="Mixture-of-experts depth heads for 3D reconstruction.")
    parser.add_argument("--version", action="version", version=f"moe3d {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked_for = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == asked_for:
            module = import_module(f"moe3d.cli.{name}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run, command=command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _report(args: argparse.Namespace | None, sentence: str, code: int, error: BaseException) -> int:
    if args is not None and args.debug:
        traceback.print_exception(error)
    print(f"{args.command.prog if args else 'moe3d'}: {sentence}", file=sys.stderr)
    return code


def _sentence(error: Exception) -> str:
    """What a user needs to know of an exception, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error.strerror}"
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)) and text:
        return f"error: {text}"
    return f"error: unexpected {type(error).__name__}{f': {text}' if text else ''} (--debug shows where)"

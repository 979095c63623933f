"""What every command has in common: arguments, exit codes, one sentence per error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import moe3d
from moe3d import cli

HEAVY = {"scipy", "skimage", "trimesh", "PIL", "safetensors", "moe3d.evaluation", "moe3d.viz", "moe3d.data"}


@pytest.fixture
def command(monkeypatch):
    """``command(run)`` adds the command ``probe``, with ``run(args)`` behind it."""

    def add(run):
        module = types.ModuleType("moe3d.cli.probe")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=3)
        module.run = run
        monkeypatch.setitem(sys.modules, "moe3d.cli.probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", "does what the test wants")

    return add


def _raise(error):
    def run(args):
        raise error

    return run


def test_a_command_gets_its_arguments_and_ends_with_0(command):
    seen = []
    command(lambda args: seen.append(args.number))
    assert cli.main(["probe", "--number", "5"]) == 0
    assert cli.main(["probe"]) == 0
    assert seen == [5, 3]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "moe3d: error: the following arguments are required: COMMAND (see moe3d --help)"),
        (["prob"], "moe3d: error: argument COMMAND: invalid choice: 'prob'"),
        (["probe", "--nonsense"], "moe3d probe: error: unrecognized arguments: --nonsense (see moe3d probe --help)"),
        (["probe", "--num", "5"], "moe3d probe: error: unrecognized arguments: --num 5"),
        (["probe", "--number", "many"], "moe3d probe: error: argument --number: invalid int value: 'many'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(command, capsys, argv, says):
    command(lambda args: pytest.fail("must not run"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith(says)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("size must be\n  two numbers"), "error: size must be two numbers"),
        (RuntimeError("backend 'cuda' cannot run here because"), "error: backend 'cuda' cannot run here because"),
        (PermissionError(13, "Permission denied", "/there"), "error: /there: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (MemoryError(), "error: unexpected MemoryError (--debug shows where)"),
        (KeyError("depth"), "error: unexpected KeyError: 'depth' (--debug shows where)"),
        (ValueError(), "error: unexpected ValueError (--debug shows where)"),
    ],
)
def test_an_error_is_one_sentence_and_code_1(command, capsys, error, says):
    command(_raise(error))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr() == ("", f"moe3d probe: {says}\n")


def test_a_traceback_comes_with_debug_only(command, capsys):
    command(_raise(ValueError("size must be two numbers")))
    assert cli.main(["probe", "--debug"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "raise error" in errors
    assert errors.endswith("moe3d probe: error: size must be two numbers\n")


def test_an_interrupt_ends_with_130(command, capsys):
    command(_raise(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr() == ("", "moe3d probe: interrupted\n")


def test_termination_unwinds_ends_with_143_and_gives_the_handler_back(command, capsys):
    cleaned_up = []

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned_up.append(True)

    before = signal.getsignal(signal.SIGTERM)
    command(run)
    assert cli.main(["probe"]) == 143
    assert cleaned_up and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr() == ("", "moe3d probe: terminated\n")


def test_a_path_that_the_terminal_cannot_show_is_escaped(command, capsys):
    command(lambda args: print("written to", os.fsdecode(b"caf\xe9")))
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr() == ("written to caf\\udce9\n", "")


def test_version_and_help(capsys):
    for argv in (["--version"], ["--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(argv)
        assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"moe3d {moe3d.__version__}\n")
    assert all(name in output for name in cli.COMMANDS) and "--debug" in output


def test_every_command_is_a_module_with_both_functions():
    for name in cli.COMMANDS:
        module = __import__(f"moe3d.cli.{name}", fromlist=["run"])
        assert callable(module.add_arguments) and callable(module.run)


def _python(*args: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(moe3d.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, check=False, **options
    )


def test_python_dash_m_exits_with_mains_code_from_any_folder(tmp_path):
    done = _python("-m", "moe3d", "nonsense", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moe3d: error: argument COMMAND: invalid choice: 'nonsense'")


@pytest.mark.parametrize("started_as", [["-m", "moe3d"], ["program/moe3d"]])
@pytest.mark.parametrize("imported", ["torch", "moe3d.cli"])
def test_an_interrupt_before_there_is_a_command_is_one_line_and_130(tmp_path, started_as, imported):
    """While PyTorch is imported, the last time for a Ctrl-C to be a traceback, and while the command line is."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "moe3d").write_text("import sys\nfrom moe3d.cli import main\nsys.exit(main())\n")
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys

class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting)
""")
    path = os.pathsep.join([str(tmp_path), str(Path(moe3d.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *started_as, "info"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "moe3d: interrupted\n")


def test_info_imports_no_heavy_library(tmp_path):
    code = f"import sys; from moe3d.cli import main; main(['info']); print(sorted({HEAVY!r} & set(sys.modules)))"
    done = _python("-c", code, cwd=tmp_path)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.parametrize("options", [["-um", "moe3d"], ["-mmoe3d"], ["-Bm", "moe3d"], ["-W", "default", "-m", "moe3d"]])
def test_however_python_is_told_which_module(tmp_path, options):
    done = _python(*options, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"moe3d {moe3d.__version__}\n"), done.stderr


@pytest.mark.parametrize("options", [["-um", "mine"], ["-mmine"]])
def test_another_module_that_imports_this_package(tmp_path, options):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import moe3d\n")
    (tmp_path / "mine" / "__main__.py").write_text("import signal\nprint(signal.getsignal(signal.SIGINT).__name__)\n")
    done = _python(*options, cwd=tmp_path)
    assert done.stdout == "default_int_handler\n", done.stderr


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_process_without_standard_streams_does_its_work(command, monkeypatch, closed):
    """As daemons have it; Python then has None in their place."""
    command(lambda args: print("done", file=getattr(sys, closed)))
    monkeypatch.setattr(sys, closed, None)
    assert cli.main(["probe"]) == 0


def test_a_reader_that_went_away_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(Path(moe3d.__file__).parents[1])}
    command_line = [sys.executable, "-m", "moe3d", "info"]
    done = subprocess.run(
        command_line, env=environment, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")

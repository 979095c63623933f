"""Files appear under their name only when they are whole: every file that the package writes goes through here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EISDIR, ENOTDIR
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write, which becomes ``path`` when the block ends and vanishes when it raises.

    Its bytes are on disk before the name changes, so that not even a crash of the machine costs what was there before.

    Yields:
        The temporary file's path, beside ``path``; it does not exist yet.

    A link is followed.

    Raises:
        OSError: ``path`` cannot be written, or is something else than a file.
    """
    check_file(path)
    path = Path(os.path.realpath(path))
    # Cut, because a name may be as long as the file system allows already.
    unfinished = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        unfinished.touch()
        permissions = unfinished.stat().st_mode  # those of any new file; safetensors' own would be the owner's alone
        unfinished.unlink()
        yield unfinished
        unfinished.chmod(permissions)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_file(path: str | os.PathLike[str]) -> None:
    """OSError for what no file may take the place of: a folder, a device, a pipe."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "must be a file, but is a folder", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(EEXIST, "must be a file, but is a device or a pipe", str(path))


@contextmanager
def output_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``target`` when the block ends and vanishes when it raises.

    A new folder (its missing parents with it) is written beside its place and renamed. Into a folder that exists the
    files move one by one, those of equal names are replaced, all others stay.

    Args:
        target: the folder that the results are for.

    Yields:
        The temporary folder, empty.

    Raises:
        OSError: ``target`` or one of its parents is a file, or cannot be written; before anything is yielded. A file
            would replace a folder or the other way round; before anything is moved.
    """
    target = Path(os.path.abspath(target))
    new = _topmost_missing(target)
    shelf = _make_shelf(target if new is None else new.parent, target)
    try:
        filled = shelf / (target if new is None else new).name / target.relative_to(new or target)
        filled.mkdir(parents=True)
        yield filled
        if new is not None and not os.path.lexists(new):
            os.rename(shelf / new.name, new)
        else:
            _move_files(filled, target)
    finally:
        shutil.rmtree(shelf, ignore_errors=True)


def make_folder(target: str | os.PathLike[str]) -> Path | None:
    """Make a folder with its missing parents.

    Returns:
        The outermost folder that was made; None if ``target`` was there.

    Raises:
        OSError: ``target`` or one of its parents is a file, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    new = _topmost_missing(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(error.errno, f"cannot be written ({error.strerror})", str(target)) from error
    return new


def _topmost_missing(target: Path) -> Path | None:
    """The outermost folder that must be made for ``target`` to exist; None if it exists."""
    missing = None
    for folder in (target, *target.parents):
        if folder.is_dir():
            return missing
        if os.path.lexists(folder):
            raise NotADirectoryError(ENOTDIR, "must be a folder, but is a file", str(folder))
        missing = folder
    return missing


def _make_shelf(folder: Path, target: Path) -> Path:
    """A private folder on the same file system, to hold the results until they are whole."""
    try:
        return Path(tempfile.mkdtemp(prefix=".moe3d-", suffix=".tmp", dir=folder))
    except OSError as error:
        raise type(error)(error.errno, f"cannot be written ({error.strerror})", str(target)) from error


def _move_files(source: Path, target: Path) -> None:
    files = [file.relative_to(source) for file in sorted(source.rglob("*")) if not file.is_dir()]
    for file in files:
        _check_replaceable(target, file)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, os.path.realpath(target / file))


def _check_replaceable(target: Path, file: Path) -> None:
    check_file(target / file)
    for parent in file.parents:
        if os.path.lexists(target / parent) and not (target / parent).is_dir():
            raise FileExistsError(EEXIST, "is a file where a folder is needed", str(target / parent))

"""Results appear when they are whole, or not at all."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from moe3d.atomic import output_folder, whole_file


def _fill(folder, **files):
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def _tree(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_a_file_appears_when_it_is_whole(tmp_path):
    (tmp_path / "a.bin").write_text("old")
    with whole_file(tmp_path / "a.bin") as unfinished:
        unfinished.write_text("new")
        assert unfinished.name.startswith(".") and unfinished.name.endswith(".tmp")
        assert (tmp_path / "a.bin").read_text() == "old"
    assert _tree(tmp_path) == {"a.bin": "new"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_unfinished_file_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a.bin").write_text("old")
    with pytest.raises(type(error)), whole_file(tmp_path / "a.bin") as unfinished:
        unfinished.write_text("ne")
        raise error
    assert _tree(tmp_path) == {"a.bin": "old"}


def test_a_file_is_as_open_as_any_new_one(tmp_path):
    """Whatever its writer thinks: safetensors' is for the owner alone."""
    (tmp_path / "plain").write_text("")
    with whole_file(tmp_path / "a.safetensors") as unfinished:
        save_file({"a": torch.ones(3)}, unfinished)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_may_have_the_longest_of_names(tmp_path):
    with whole_file(tmp_path / ("a" * 255)) as unfinished:
        unfinished.write_text("1")
    assert _tree(tmp_path) == {"a" * 255: "1"}


def other_things(folder):
    """A pipe, and a link to one; devices are like them."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    return [folder / "pipe", folder / "link"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    for path in other_things(tmp_path):
        with pytest.raises(OSError, match="must be a file, but is a device or a pipe"), whole_file(path):
            pytest.fail("begun")
        with pytest.raises(OSError, match="must be a file"), output_folder(tmp_path) as folder:
            (folder / path.name).write_text("new")
        assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with whole_file(link) as unfinished:
        unfinished.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    with output_folder(tmp_path) as folder:
        (folder / "link").write_text("newer")
    assert link.is_symlink() and target.read_text() == "newer"


def test_a_new_folder_appears_whole_and_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b"
    with output_folder(target) as folder:
        assert folder.is_dir() and not any(folder.iterdir())
        _fill(folder, one="1", sub__two="2")
        assert not (tmp_path / "a").exists()
        assert all(name.startswith(".") and name.endswith(".tmp") for name in os.listdir(tmp_path))
    assert _tree(tmp_path) == {"a/b/one": "1", "a/b/sub/two": "2"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_folder_is_as_open_as_mkdir_makes_it(tmp_path):
    (tmp_path / "plain").mkdir()
    with output_folder(tmp_path / "new"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "new")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error), output_folder(tmp_path / "a" / "b") as folder:
        _fill(folder, one="1")
        raise error
    assert os.listdir(tmp_path) == []


def test_files_of_an_existing_folder_are_replaced_and_others_stay(tmp_path):
    _fill(tmp_path, kept="old", one="old", sub__two="old", sub__kept="old")
    with output_folder(tmp_path) as folder:
        _fill(folder, one="new", sub__two="new", deep__er__three="new")
        assert _tree(tmp_path)["one"] == "old"
    assert _tree(tmp_path) == {
        "kept": "old", "one": "new", "sub/two": "new", "sub/kept": "old", "deep/er/three": "new",
    }  # fmt: skip


def test_an_existing_folder_is_untouched_by_a_failure(tmp_path):
    _fill(tmp_path, one="old")
    with pytest.raises(ValueError), output_folder(tmp_path) as folder:
        _fill(folder, one="new", two="new")
        raise ValueError
    assert _tree(tmp_path) == {"one": "old"}


@pytest.mark.parametrize("target", ["file", "file/below", "link"])
def test_a_file_where_a_folder_is_needed_is_an_error_at_once(tmp_path, target):
    _fill(tmp_path, file="mine")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError) as caught, output_folder(tmp_path / target):
        pytest.fail("must not begin")
    assert caught.value.filename == str(tmp_path / target.split("/")[0])
    assert sorted(os.listdir(tmp_path)) == ["file", "link"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["/proc/moe3d-cannot-be-here", "/proc/moe3d/below"])
def test_what_cannot_be_written_is_an_error_at_once(target):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc, which nobody can write to")
    with pytest.raises(OSError, match="cannot be written") as caught, output_folder(target):
        pytest.fail("must not begin")
    assert caught.value.filename == target


def test_a_read_only_folder_is_an_error_at_once(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written"), output_folder(tmp_path / "new"):
        pytest.fail("must not begin")


@pytest.mark.parametrize(("mine", "theirs"), [("one__two", "one"), ("one", "one__two")])
def test_a_clash_of_file_and_folder_moves_nothing(tmp_path, mine, theirs):
    _fill(tmp_path, **{theirs: "old", "kept": "old"})
    before = _tree(tmp_path)
    with pytest.raises(OSError) as caught, output_folder(tmp_path) as folder:
        _fill(folder, kept="new", **{mine: "new"})
    assert caught.value.filename == str(tmp_path / "one")
    assert _tree(tmp_path) == before


def test_a_folder_that_appeared_meanwhile_is_filled(tmp_path):
    with output_folder(tmp_path / "new") as folder:
        _fill(folder, one="1")
        _fill(tmp_path, new__other="theirs")
    assert _tree(tmp_path) == {"new/one": "1", "new/other": "theirs"}


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with output_folder(tmp_path / "link") as folder:
        _fill(folder, one="1")
    assert (tmp_path / "link").is_symlink() and _tree(tmp_path / "real") == {"one": "1"}


def test_a_relative_target_is_meant_from_where_the_work_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with output_folder("new") as folder:
        _fill(folder, one="1")
        os.chdir("elsewhere")
    assert _tree(tmp_path) == {"new/one": "1"}

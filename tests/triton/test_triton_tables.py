"""Launch configurations: which row serves which GPU, and what autotuning writes."""

import json

import pytest

pytest.importorskip("triton")

from moe3d.kernels import tables


@pytest.fixture
def user_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE3D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "triton.json"


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), "8.0"), ((8, 6), "8.0"), ((8, 9), "8.0"), ((9, 0), "9.0"), ((10, 3), "10.0"), ((12, 0), "12.0")],
)
def test_row_of_an_architecture(capability, row):
    assert tables.architecture(capability) == row


def test_every_row_is_complete():
    table = json.loads(tables.DEFAULTS.read_text())
    kernels = {"forward", "columns", "recompute", "feature_gradient", "weight_gradient"}
    for row in table.values():
        assert set(row) == kernels
        for kinds in row.values():
            assert set(kinds) == {"half", "tf32", "ieee"}
            assert all(tables.Config(**entry) for entry in kinds.values())
        for kernel, kinds in row.items():  # what is not chosen for a class of shapes must serve every shape
            formulation = "columns" if kernel == "columns" else "direct"
            assert {tables.Config(**entry).formulation for entry in kinds.values()} == {formulation}


def test_groups_are_narrower_beside_more_columns_unless_they_were_tuned(user_file):
    def width(columns, kernel="forward"):
        return tables.config(kernel, "half", (9, 0), "Some GPU", columns, "C128-N640").max_width

    assert [width(columns) for columns in (16, 32, 64, 128)] == [256, 128, 128, 64]
    assert width(64, "weight_gradient") == width(16, "weight_gradient")
    wide = tables.config("forward", "half", (9, 0), "Some GPU", 16)
    tables.choose("forward", "half", "Some GPU", "C128-N640", wide)
    assert width(64) == 256


@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_columns_are_raced_only_where_the_width_grows(kind):
    for wider in (False, True):
        found = tables.candidates(kind, (9, 0), 16, wider)
        assert [c.name for c in found.values()] == list(found)
        assert ("columns" in {c.formulation for c in found.values()}) == wider


def test_tuning_writes_the_fastest_that_runs(user_file):
    from triton.runtime.errors import OutOfResources

    options = list(tables.candidates("half", (9, 0), 16, True).values())
    default = tables.config("forward", "half", (9, 0), "Some GPU", 16, "C128-N256")
    assert options[0] == default and len(set(options)) == len(options)

    def time(config):
        if config.num_stages > default.num_stages:
            raise OutOfResources(1, 0, "shared memory")
        return 1.0 if config == options[3] else 2.0 + config.num_stages

    assert not tables.is_tuned("forward", "half", "Some GPU", "C128-N256")
    fastest = tables.tune("forward", "half", "Some GPU", "C128-N256", options, time)
    assert fastest in options and fastest.num_stages <= default.num_stages
    assert tables.is_tuned("forward", "half", "Some GPU", "C128-N256")
    assert tables.config("forward", "half", (9, 0), "Some GPU", 16, "C128-N256") == fastest
    assert tables.config("forward", "half", (9, 0), "Another GPU", 16, "C128-N256") == default
    assert [p.name for p in user_file.parent.iterdir()] == ["triton.json"]


def test_nothing_that_runs_is_an_error(user_file):
    from triton.runtime.errors import OutOfResources

    def time(config):
        raise OutOfResources(1, 0, "shared memory")

    with pytest.raises(RuntimeError, match="Some GPU"):
        options = list(tables.candidates("half", (8, 0), 16, True).values())
        tables.tune("forward", "half", "Some GPU", "any", options, time)

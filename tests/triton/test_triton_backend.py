"""Why the backend cannot run, in words."""

import importlib.metadata

import pytest
import torch

from moe3d.ops import dispatch
from moe3d.ops.triton import TritonBackend


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def version_is(monkeypatch, version):
    def answer(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton is not installed"),
        ("3.5.1", "Triton 3.5.1 is installed, and it needs 3.6 or newer"),
        ("3.6.0", None),
        ("3.10.0+git1234", None),
        ("4.0.0", None),
    ],
)
def test_version_of_triton(monkeypatch, version, reason):
    version_is(monkeypatch, version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TritonBackend().unavailable() == reason


def test_no_device(monkeypatch):
    version_is(monkeypatch, "3.9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonBackend().unavailable() == "there is no CUDA device"


def test_rocm(monkeypatch):
    version_is(monkeypatch, "3.9.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in TritonBackend().unavailable()


def test_it_is_used_only_where_it_is_asked_for(monkeypatch):
    """Until it has been found right on a GPU."""
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    assert dispatch.backends()["triton"] is None
    assert "triton" not in dispatch.automatic_backends()


def test_tensors_elsewhere_and_old_gpus(monkeypatch):
    from moe3d.ops.gpu import unsupported

    assert "'cpu'" in unsupported(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, reason in (((7, 5), "Tesla T4 has compute capability 7.5, below 8.0"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert unsupported(torch.device("cuda")) == reason

from __future__ import annotations

import pytest
import torch

from moe3d.ops import native
from support.isas import bf16_isas, isas


def _skipped(reason: str):
    return [pytest.param("none", marks=pytest.mark.skip(reason=reason))]


@pytest.fixture(params=isas() or _skipped("no C++ part"))
def isa(request, monkeypatch):
    """Every instruction set that this build has and this processor runs."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=bf16_isas() or _skipped("this processor has no avx512_bf16"))
def bf16_isa(request, monkeypatch):
    """Every one that multiplies in bfloat16."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that the backend hands to the kernels holds NaN, so that what they do not write shows."""
    empty = torch.empty
    monkeypatch.setattr(native.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))

"""The registry of backends and the choice among them."""

from __future__ import annotations

import threading

import pytest
import torch

import moe3d
from moe3d.benchmark.case import arithmetic
from moe3d.ops import dispatch, gpu
from moe3d.ops.backend import Backend
from moe3d.ops.reference import ReferenceBackend
from support.problems import random_problem

ORDER = ["triton", "cuda", "cpu", "reference"]


def test_backends_says_what_can_run_and_why_not():
    found = moe3d.backends()
    assert list(found) == ORDER and found["reference"] is None
    for name, reason in found.items():
        assert reason is None or (isinstance(reason, str) and len(reason) > 10), name


@pytest.mark.parametrize("name", ORDER)
def test_an_explicit_backend_runs_or_says_why_not(name):
    reason = moe3d.backends()[name]
    problem = random_problem()
    if reason is None:
        assert problem.run(backend=name).prediction.isfinite().all()
        return
    for batch in (2, 0):
        with pytest.raises(RuntimeError) as caught:
            random_problem(batch=batch).run(backend=name)
        assert f"{name!r}" in str(caught.value) and reason in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_do_not_run_without_a_gpu(name):
    if moe3d.backends()[name] is None:  # Triton's interpreter, which runs its kernels on the CPU, may serve
        pytest.skip(f"{name} runs without a GPU here")
    with pytest.raises(RuntimeError, match=f"'{name}' cannot run here because"):
        random_problem().run(backend=name)


@pytest.mark.parametrize("backend", [name for name, reason in moe3d.backends().items() if reason is None])
def test_float64_is_the_reference_backends(backend):
    problem = random_problem(dtype=torch.float64)
    if backend == "reference":
        assert problem.run(backend=backend).prediction.dtype == torch.float64
        return
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot run here because .*float64"):
        problem.run(backend=backend)


def test_auto_always_finds_a_backend_for_float64():
    problem = random_problem(dtype=torch.float64)
    assert torch.equal(problem.run().prediction, problem.run(backend="reference").prediction)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_precision_that_no_backend_has(precision, backend):
    """Explicitly asked for, so never replaced by another one in silence."""
    problem = random_problem(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"'reference' cannot run here because precision '{precision}'"):
        problem.run(precision=precision, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tf32_is_refused_on_the_cpu(backend):
    with pytest.raises(RuntimeError, match=r"'reference' cannot run here because precision 'tf32' .* x is on 'cpu'"):
        random_problem().run(precision="tf32", backend=backend)


class Recorder(Backend):
    """A backend that says what it is told to, and computes as the reference does."""

    def __init__(self, machine=None, call=None):
        self.machine, self.call, self.ran = machine, call, []

    def unavailable(self):
        return self.machine

    def unsupported(self, tensors, options):
        return self.call

    def forward(self, tensors, options):
        self.ran.append("forward")
        return ReferenceBackend().forward(tensors, options)

    def backward(self, tensors, options, cotangents, needs):
        self.ran.append("backward")
        return ReferenceBackend().backward(tensors, options, cotangents, needs)


@pytest.mark.parametrize(
    ("machine", "call", "serves"), [(None, None, True), ("no", None, False), (None, "no", False)], ids=str
)
def test_auto_takes_the_first_that_can_serve(monkeypatch, machine, call, serves):
    first, second = Recorder(machine, call), Recorder()
    monkeypatch.setitem(dispatch._REGISTRY, "triton", first)
    monkeypatch.setitem(dispatch._REGISTRY, "cuda", second)
    problem = random_problem().leaves()
    problem.run().prediction.sum().backward()
    assert (first if serves else second).ran == ["forward", "backward"]
    assert (second if serves else first).ran == []


def test_the_backward_runs_on_the_backend_of_the_forward(monkeypatch):
    other = Recorder()
    monkeypatch.setitem(dispatch._REGISTRY, "triton", other)
    problem = random_problem().leaves()
    problem.run(backend="reference").prediction.sum().backward()
    assert other.ran == []


def test_auto_precision_is_float32_in_these_tests():
    """On every machine, unless a test asks for tf32, as PyTorch's default does."""
    assert not gpu.convolutions_use_tf32()
    with arithmetic("tf32"):
        assert gpu.convolutions_use_tf32()
    assert not gpu.convolutions_use_tf32()


@pytest.fixture
def user_precision():
    """PyTorch's switch for the arithmetic of CPU convolutions, where the user has put it to "bf16"."""
    conv = getattr(torch.backends.mkldnn, "conv", None)
    if conv is None:
        pytest.skip("this PyTorch has no switch for the arithmetic of CPU convolutions")
    before, conv.fp32_precision = conv.fp32_precision, "bf16"
    yield conv
    conv.fp32_precision = before


def test_an_explicit_precision_sets_pytorchs_switches_back(monkeypatch, user_precision):
    """Global switches, also under errors and from several threads at once."""
    conv = user_precision
    seen = []
    real = torch.nn.functional.conv2d

    def spy(*args, **kwargs):
        seen.append(conv.fp32_precision)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    problem = random_problem()

    def work():
        for _ in range(5):
            problem.run(backend="reference", precision="ieee")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {"ieee"} and conv.fp32_precision == "bf16"
    seen.clear()
    problem.run(backend="reference", precision="auto")
    assert set(seen) == {"bf16"}, "'auto' is PyTorch's own choice"

    def broken(*args, **kwargs):
        raise ArithmeticError

    monkeypatch.setattr(torch.nn.functional, "conv2d", broken)
    with pytest.raises(ArithmeticError):
        problem.run(backend="reference", precision="ieee")
    assert conv.fp32_precision == "bf16"
    monkeypatch.setattr(torch.nn.functional, "conv2d", real)
    problem.run(backend="reference", precision="ieee")  # the lock was released

"""The stages of ``make gpu`` and their items.

An item is a name and a function that returns what to write down, raises :class:`Skip` with a reason, or fails. Stages
look for backends themselves (``moe3d.backends()``, then a call on the device): a new one needs no change here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
_SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_TAIL = 2000  # characters kept of a failed command's output


class Skip(Exception):
    """An item has nothing to do here; the message says why."""


@dataclass(frozen=True)
class Item:
    name: str
    run: Callable[[], dict | None]


@dataclass(frozen=True)
class Stage:
    """``items(context)`` is called in the worker. ``always``: also where an earlier run has done it."""

    about: str
    limit_s: float
    items: Callable[[Context], list[Item]]
    always: bool = False


class Context:
    """Where the items run, and with which backends."""

    def __init__(self, device: str, commit: str | None = None):
        self.device, self.commit = device, commit

    @functools.cached_property
    def backends(self) -> dict[str, str | None]:
        """Every backend but the reference: None if it serves this device, else why not."""
        import moe3d

        return {name: reason or self._refusal(name) for name, reason in moe3d.backends().items() if name != "reference"}

    def _refusal(self, name: str) -> str | None:
        """Why a backend that runs on this machine does not serve the device; any other failure is for the items."""
        from bench.gpu.calls import Call
        from moe3d.benchmark.case import Case

        try:
            Call(Case(1, 14, 14, device=self.device), name).forward()
        except RuntimeError as error:
            return str(error).partition(f"backend {name!r} cannot run here because ")[2] or None
        return None

    def for_each_backend(self, items: Callable[[str], list[Item]]) -> list[Item]:
        """The items of each backend; of one that cannot run, a single item that says why."""
        found = []
        for name, reason in self.backends.items():
            found += items(name) if reason is None else [Item(name, functools.partial(_skip, reason))]
        return found

    @functools.cached_property
    def session(self):
        from moe3d.benchmark.session import Session

        session = Session(self.device, ROOT)
        session.run["commit"] = session.run["commit"] or self.commit
        return session


def _skip(reason: str) -> None:
    raise Skip(reason)


def source_digest() -> str:
    """Of all that decides a result: results of other sources are not taken up."""
    digest = hashlib.sha256()
    for folder in ("moe3d", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".txt"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _command(command: Iterable[str], cwd: Path = ROOT) -> str:
    done = subprocess.run(list(command), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}: {done.stdout[-_TAIL:]}")
    return done.stdout


# build


def _build(context: Context) -> list[Item]:
    return [Item("install", _install), Item("import", _import_installed), Item("machine", lambda: context.session.run)]


def _install() -> None:
    _command([sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", str(ROOT)])


def _import_installed() -> dict:
    """From elsewhere and from the repository's root, where Python sees the source folder first."""
    found = {}
    with tempfile.TemporaryDirectory() as elsewhere:
        for where in (Path(elsewhere), ROOT):
            found[where.name] = _command(
                [sys.executable, "-c", "import json, moe3d; print(json.dumps(moe3d.backends()))"], where
            )
    inside, outside = (json.loads(text.splitlines()[-1]) for text in found.values())
    if inside != outside:
        raise RuntimeError(f"backends differ between an import from the root, {inside}, and from elsewhere, {outside}")
    return {"backends": inside}


# right


def _right(context: Context) -> list[Item]:
    from bench.gpu.calls import accuracy

    def items(backend: str) -> list[Item]:
        cases = _right_cases(context.device)
        sizes = [Item(f"{backend} {case.label}", functools.partial(accuracy, case, backend)) for case in cases]
        return [*sizes, Item(f"{backend} op.md's matrix", functools.partial(_matrix, context.device, backend))]

    return context.for_each_backend(items)


def _right_cases(device: str):
    """VGGT's sizes at every precision, then many experts, a single one, and a small odd image."""
    from moe3d.benchmark.case import PRECISIONS, Case

    sizes = [
        {},
        {"frames": 8, "height": 154},
        {"experts": 16},
        {"experts": 1},
        {"frames": 3, "height": 98, "width": 70},
    ]
    return [Case(precision=p, device=device, **size) for size in sizes for p in PRECISIONS]


def _matrix(device: str, backend: str) -> dict:
    """The tests of the operation, which cover shapes, dtypes, modes, gradients and errors, for one backend."""
    return _pytest("tests/ops", "-k", f"{backend}-{device}")


def _pytest(*arguments: str) -> dict:
    """Counts, and the names of what failed."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not xml.is_file():
            raise RuntimeError(f"pytest ended with code {done.returncode}: {done.stdout[-_TAIL:]}")
        suite = ElementTree.parse(xml).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    if counts["tests"] == 0:
        raise Skip("no test is for it")
    failed = [
        c.get("name") for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None
    ]
    if failed:
        raise RuntimeError(f"{len(failed)} of {counts['tests']} tests failed: {', '.join(failed[:20])}")
    return counts


# fast


def _fast(context: Context) -> list[Item]:
    """The headline first; torch.compile's search takes longest and comes last."""
    from moe3d.benchmark import heads, peers, sharpening
    from moe3d.benchmark.case import Case

    quick = [name for name in peers.peers() if name != peers.COMPILED]
    compiled = [peers.STOCK, peers.STOCK_CACHED, peers.CONCATENATED, peers.COMPILED, *context.backends]
    device = context.device
    plan = [("tail", Case(f, precision=p, device=device), quick) for f in (8, 1) for p in ("bf16", "tf32")]
    plan += [("head", Case(f, precision="tf32", device=device), heads.names()) for f in (8, 1)]
    plan += [("mini", Case(f, channels=32, precision="tf32", device=device), heads.names()) for f in (8, 1)]
    plan += [("vggt", Case(f, precision="tf32", device=device), heads.names()) for f in (8, 1)]
    plan.append(("sharpen", Case(8, experts=1, device=device), sharpening.names()))
    named = [(f"{suite} {case.label}", suite, case, names) for suite, case, names in plan]
    named += [
        (f"torch.compile {case.label}", "tail", case, compiled)
        for case in (Case(f, precision=p, device=device) for f in (8, 1) for p in ("bf16", "tf32"))
    ]
    return [Item(name, functools.partial(_race, context, *rest)) for name, *rest in named]


def _race(context: Context, suite: str, case, names: list[str]) -> dict:
    from moe3d.benchmark.race import Effort

    before = len(context.session.records)
    try:
        outcomes = context.session.race(suite, case, Effort(seconds=6, least_rounds=20, most_rounds=200), names)
    except ImportError as error:
        raise Skip(str(error)) from None
    refused = {name: outcome.refused for name, outcome in outcomes.items() if outcome.refused}
    records = [dataclasses.asdict(r) for r in context.session.records[before:]]
    return {"records": records, "refused": refused}


# tune


def _tune(context: Context) -> list[Item]:
    def items(backend: str) -> list[Item]:
        if backend != "cuda":
            return [Item(backend, functools.partial(_tune_one, context.device, backend))]
        return _cuda_formulations(context.device)

    return context.for_each_backend(items)


def _cuda_formulations(device: str) -> list[Item]:
    """Its two formulations, each at VGGT's size in every precision; which one "auto" takes is counted so far."""
    from moe3d.benchmark.case import PRECISIONS, Case

    cases = [Case(f, precision=p, device=device) for p in PRECISIONS for f in (8, 1)]
    return [
        Item(f"cuda {formulation} {case.label}", functools.partial(_forced, formulation, case))
        for case in cases
        for formulation in ("low-resolution", "direct")
    ]


def _forced(formulation: str, case) -> dict:
    """The ``cuda`` backend's errors, and its times beside plain PyTorch's, with this formulation."""
    from bench.gpu.calls import accuracy
    from moe3d.benchmark.peers import CONCATENATED
    from moe3d.benchmark.race import Effort
    from moe3d.benchmark.statistics import quantiles
    from moe3d.benchmark.suites import RACES
    from moe3d.ops.native_cuda import FORMULATION_VARIABLE

    os.environ[FORMULATION_VARIABLE] = formulation
    try:
        errors = accuracy(case, "cuda")
        effort = Effort(seconds=3, least_rounds=20, most_rounds=100)
        outcomes = RACES["tail"].run(case, effort, [CONCATENATED, "cuda"])
    finally:
        del os.environ[FORMULATION_VARIABLE]
    times = {name: 1e3 * quantiles(outcome.times).p50 for name, outcome in outcomes.items() if outcome.times}
    return {"errors": errors, "times_ms": times}


def _tune_one(device: str, backend: str) -> dict:
    from moe3d.benchmark.tuning import tune

    results = tune(backend, device)
    if results is None:
        raise Skip("it has only one formulation")
    return results


# sanitizers


def _sanitizers(context: Context) -> list[Item]:
    return context.for_each_backend(
        lambda backend: [Item(f"{backend} {tool}", functools.partial(_sanitize, tool, backend)) for tool in _SANITIZERS]
    )


def _sanitize(tool: str, backend: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    call = [sys.executable, "-m", "bench.gpu.calls", backend]
    _command([program, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all", *call])


# determinism, CUDA graphs, streams, devices, large tensors


def _checked(check: str) -> Callable[[Context], list[Item]]:
    """One item per backend, which runs a function of :mod:`bench.gpu.calls` with it."""

    def items(context: Context) -> list[Item]:
        from bench.gpu import calls

        run = getattr(calls, check)
        return context.for_each_backend(
            lambda backend: [Item(backend, functools.partial(run, context.device, backend))]
        )

    return items


STAGES = {
    "build": Stage("install without build isolation, import, backends, ceilings", 90, _build, always=True),
    "right": Stage("every GPU backend against the float64 truth, outputs and gradients", 180, _right),
    "fast": Stage("headline ratios and the overhead end to end, interleaved", 210, _fast),
    "tune": Stage("race the formulations that backends offer, write the tuned table", 600, _tune),
    "sanitizers": Stage(f"compute-sanitizer: {', '.join(_SANITIZERS)}", 600, _sanitizers),
    "determinism": Stage("100 runs, forward and backward, bit for bit", 300, _checked("determinism")),
    "graphs": Stage("captured in a CUDA graph, replayed on new inputs", 120, _checked("cuda_graph")),
    "streams": Stage("two streams at once", 120, _checked("two_streams")),
    "devices": Stage("tensors on another than the current GPU", 120, _checked("second_device")),
    "large": Stage("more than 2^31 elements", 300, _checked("large")),
    "suite": Stage("the whole test suite", 1800, lambda context: [Item("tests", functools.partial(_pytest, "tests"))]),
}

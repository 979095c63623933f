"""The stages of ``make gpu`` and their items.

An item is a name and a function that returns what to write down, raises :class:`Skip` with a reason, or fails. The
stage ``probe`` finds the backends (``moe3d.backends()``, then a call on the device of each): a new one needs no change
here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu.state import PASSED, SKIPPED

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
    """``items(context)`` is called in the worker. ``item_s``: after so long an item has hung, and is ended.

    ``always``: also where an earlier run has done it.
    """

    about: str
    limit_s: float
    items: Callable[[Context], list[Item]]
    item_s: float = 120
    always: bool = False


class Context:
    """Where the items run, and with which backends: ``probes`` are the entries of the stage of that name."""

    def __init__(self, device: str, commit: str | None = None, probes: Mapping[str, dict] | None = None):
        self.device, self.commit, self.probes = device, commit, probes or {}

    def runs(self, backend: str) -> bool:
        return self.probes[backend]["status"] == PASSED

    def racing(self, names: Iterable[str]) -> list[str]:
        """Those but the backends that do not run: what ends a process would end the race."""
        return [name for name in names if name not in self.probes or self.runs(name)]

    def for_each_backend(self, items: Callable[[str], list[Item]]) -> list[Item]:
        """The items of each backend, which take turns; of one that does not run, a single item that says why."""
        lists = [
            items(name) if self.runs(name) else [Item(name, functools.partial(_as_its_probe, **entry))]
            for name, entry in self.probes.items()
        ]
        return [item for turn in itertools.zip_longest(*lists) for item in turn if item is not None]

    @functools.cached_property
    def session(self):
        from moe3d.benchmark.session import Session

        session = Session(self.device, ROOT)
        session.run["commit"] = session.run["commit"] or self.commit
        return session


def _skip(reason: str) -> None:
    raise Skip(reason)


def _as_its_probe(status: str, reason: str, **_) -> None:
    raise Skip(reason) if status == SKIPPED else RuntimeError(f"its probe failed: {reason}")


def source_digest() -> str:
    """Of all that decides a result: results of other sources are not taken up."""
    digest, results = hashlib.sha256(), ROOT / "bench" / "results"
    for folder in ("moe3d", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cpp", ".cu", ".cuh", ".h", ".txt") and results not in path.parents:
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


# probe


def _probe(context: Context) -> list[Item]:
    import moe3d

    names = [name for name in moe3d.backends() if name != "reference"]
    return [Item(name, functools.partial(_call_once, context.device, name)) for name in names]


def _call_once(device: str, backend: str) -> None:
    """Skips a backend that cannot run on this machine or does not serve the device."""
    import moe3d
    from bench.gpu.calls import Call
    from moe3d.benchmark.case import Case

    reason = moe3d.backends()[backend]
    if reason:
        raise Skip(reason)
    try:
        Call(Case(1, 14, 14, device=device), backend).forward()
    except RuntimeError as error:
        refusal = str(error).partition(f"backend {backend!r} cannot run here because ")[2]
        if not refusal:
            raise
        raise Skip(refusal) from None


# right


def _right(context: Context) -> list[Item]:
    from bench.gpu.calls import accuracy

    def items(backend: str) -> list[Item]:
        cases = _right_cases(context.device)
        found = [Item(f"{backend} {case.label}", functools.partial(accuracy, case, backend)) for case in cases]
        if backend == "triton":
            found.insert(0, Item("triton compiles", functools.partial(_compile, context.device, backend)))
        return found

    return context.for_each_backend(items)


def _compile(device: str, backend: str) -> None:
    """Calls every case, all at once, each in a process of its own: the compiler keeps on disk what they need."""
    call = [sys.executable, "-m", "bench.gpu.calls", backend, "--device", device, "--case"]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda case: _command([*call, json.dumps(case.asdict())]), _right_cases(device)))


def _right_cases(device: str):
    """VGGT's sizes at every precision, the fastest first, then many experts, a single one, and a small odd image."""
    from moe3d.benchmark.case import PRECISIONS, Case

    sizes = [
        {},
        {"frames": 8, "height": 154},
        {"experts": 16},
        {"experts": 1},
        {"frames": 3, "height": 98, "width": 70},
    ]
    return [Case(precision=p, device=device, **size) for size in sizes for p in reversed(PRECISIONS)]


# matrix


def _matrix(context: Context) -> list[Item]:
    """The tests of the operation, which cover shapes, dtypes, modes, gradients and errors."""

    def items(backend: str) -> list[Item]:
        tests = f"{backend}-{context.device}"
        return [Item(backend, functools.partial(_pytest, "tests/ops", "-k", tests, distribution="load"))]

    return context.for_each_backend(items)


def _pytest(*arguments: str, distribution: str = "loadfile") -> dict:
    """Counts, and the names of what failed; on all cores where pytest-xdist is installed."""
    workers = ["-n", str(os.cpu_count()), "--dist", distribution] if importlib.util.find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", *workers, *arguments]
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if workers else {})
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=ROOT, env=environment, **output)
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
    compiled = [peers.STOCK, peers.STOCK_CACHED, peers.CONCATENATED, peers.COMPILED, *context.probes]
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
    return [Item(f"{name}{_table()}", functools.partial(_race, context, *rest)) for name, *rest in named]


def _tuned(context: Context) -> list[Item]:
    """The headline of the backends that have been tuned, with what they have chosen."""
    from moe3d.benchmark.case import Case
    from moe3d.benchmark.peers import STOCK, STOCK_CACHED
    from moe3d.benchmark.tuning import is_tunable

    table = _table()
    cases = [Case(f, precision=p, device=context.device) for p in ("bf16", "tf32") for f in (8, 1)]

    def items(backend: str) -> list[Item]:
        if not (table and is_tunable(backend)):
            return [Item(backend, functools.partial(_skip, "nothing of it has been tuned"))]
        run = functools.partial(_race, context, "tail", names=[STOCK, STOCK_CACHED, backend])
        return [Item(f"{backend} {case.label}{table}", functools.partial(run, case)) for case in cases]

    return context.for_each_backend(items)


def _table() -> str:
    """A mark of what has been tuned on this machine: results of other tables do not stand for this one's."""
    try:
        from moe3d.kernels.tables import user_file
    except ImportError:  # no Triton
        return ""
    return f", table {hashlib.sha256(user_file().read_bytes()).hexdigest()[:6]}" if user_file().is_file() else ""


def _race(context: Context, suite: str, case, names: list[str]) -> dict:
    from moe3d.benchmark.race import Effort

    before = len(context.session.records)
    try:
        effort = Effort(seconds=6, least_rounds=20, most_rounds=200)
        outcomes = context.session.race(suite, case, effort, context.racing(names))
    except ImportError as error:
        raise Skip(str(error)) from None
    refused = {name: outcome.refused for name, outcome in outcomes.items() if outcome.refused}
    records = [dataclasses.asdict(r) for r in context.session.records[before:]]
    return {"records": records, "refused": refused}


# tune


def _tune(context: Context) -> list[Item]:
    from moe3d.benchmark.tuning import is_tunable, tune, tuning_cases

    def items(backend: str) -> list[Item]:
        if backend == "cuda":
            return _cuda_formulations(context.device)
        if not is_tunable(backend):
            return [Item(backend, functools.partial(_skip, "it has only one formulation"))]
        cases = tuning_cases(context.device)
        return [Item(f"{backend} {case.label}", functools.partial(tune, backend, case)) for case in cases]

    return context.for_each_backend(items)


def _cuda_formulations(device: str) -> list[Item]:
    """Its two formulations, each at VGGT's size in every precision; which one "auto" takes is counted so far."""
    from moe3d.benchmark.case import PRECISIONS, Case

    cases = [Case(f, precision=p, device=device) for p in reversed(PRECISIONS) for f in (8, 1)]
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


def _suite(context: Context) -> list[Item]:
    return [Item("tests", functools.partial(_pytest, "tests"))]


# In the order of their value: those before "sanitizers" fit into the quarter of an hour for which a GPU may be lent.
STAGES = {
    "build": Stage("install without build isolation, import, backends, ceilings", 90, _build, item_s=90, always=True),
    "probe": Stage("one small call of every backend", 75, _probe, item_s=30, always=True),
    "right": Stage("every GPU backend against the float64 truth, outputs and gradients", 120, _right, item_s=60),
    "fast": Stage("headline ratios and the overhead end to end, interleaved", 195, _fast, item_s=60),
    "tune": Stage("race the formulations that backends offer, write the tuned table", 150, _tune, item_s=90),
    "tuned": Stage("the headline again, with the tuned table", 60, _tuned, item_s=30),
    "matrix": Stage("the operation's tests for every GPU backend, on all cores", 150, _matrix, item_s=100),
    "sanitizers": Stage(f"compute-sanitizer: {', '.join(_SANITIZERS)}", 600, _sanitizers, item_s=300),
    "determinism": Stage("100 runs, forward and backward, bit for bit", 300, _checked("determinism")),
    "graphs": Stage("captured in a CUDA graph, replayed on new inputs", 120, _checked("cuda_graph"), item_s=60),
    "streams": Stage("two streams at once", 120, _checked("two_streams"), item_s=60),
    "devices": Stage("tensors on another than the current GPU", 120, _checked("second_device"), item_s=60),
    "large": Stage("more than 2^31 elements", 300, _checked("large")),
    "suite": Stage("the whole test suite", 1800, _suite, item_s=1800),
}

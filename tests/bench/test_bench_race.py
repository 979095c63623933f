"""Races: only the right are timed, in rounds that hold everybody once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe3d.benchmark import peers as tail_peers
from moe3d.benchmark import sharpening
from moe3d.benchmark.accuracy import Error, Wrong
from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import (
    AVX2,
    BY_EXPERT,
    BY_EXPERT_CACHED,
    CHANNELS_LAST,
    COMPILED,
    CONCATENATED,
    ONE_EXPERT,
    STOCK,
    STOCK_CACHED,
    WIDENED,
    peers,
)
from moe3d.benchmark.race import Contestant, Effort, Unavailable, race
from moe3d.benchmark.suites import RACES
from moe3d.ops import native
from moe3d.ops.native import CPUBackend

SMALL = Case(frames=2, height=28, width=42)
SHORT = Effort(seconds=0, least_rounds=2, most_rounds=2)
NO_ERROR = Error(0.0, 0.0)


def contestant(name: str, log: list, check=lambda outputs: NO_ERROR) -> Contestant:
    return Contestant(name, lambda: lambda i: log.append((name, i)), check)


def test_every_round_holds_everybody_once_in_changing_order():
    log: list = []
    outcomes = race([contestant(n, log) for n in "abcd"], "cpu", Effort(0, 6, 6))
    names = [name for name, _ in log[4:]]  # after the checks
    rounds = [tuple(names[i : i + 4]) for i in range(0, len(names), 4)]
    assert [sorted(r) for r in rounds] == [list("abcd")] * 6
    assert len(set(rounds)) > 1
    assert all(len(outcome.times) == 6 for outcome in outcomes.values())


def test_inputs_take_turns():
    log: list = []
    race([contestant("a", log)], "cpu", Effort(0, 3, 3))
    assert [i for _, i in log] == [0, 1, 2, 3]


def test_a_slow_second_call_does_not_decide_how_many_make_a_sample(monkeypatch):
    """As torch.compile's, which records a CUDA graph: on a GPU everybody's samples take as long."""
    took = {"graph": 2**-10, "quick": 2**-11, "slow": 2**-3}
    clock = SimpleNamespace(now=0.0, calls=Counter())

    def timed(run, device):
        start = clock.now
        run()
        return clock.now - start

    def caller(name, seconds):
        def call(i):
            clock.calls[name] += 1
            clock.now += 1.0 if (name, clock.calls[name]) == ("graph", 2) else seconds

        return Contestant(name, lambda: call, lambda outputs: NO_ERROR)

    monkeypatch.setattr("moe3d.benchmark.race.time_call", timed)
    outcomes = race([caller(name, seconds) for name, seconds in took.items()], "cuda", Effort(0, 1, 1))
    assert {name: outcome.times for name, outcome in outcomes.items()} == {name: [s] for name, s in took.items()}
    before = 1 + 4 + 3  # the check, the warm-up and the estimates
    assert {name: calls - before for name, calls in clock.calls.items()} == {"graph": 11, "quick": 21, "slow": 1}


@pytest.mark.parametrize("effort, rounds", [
    (Effort(20.0, 1, 100), 20),
    (Effort(20.5, 1, 100), 20),  # another would end too late
    (Effort(20.0, 1, 3), 3),
    (Effort(0.0, 4, 100), 4),
])  # fmt: skip
def test_rounds_go_on_while_there_is_time(effort, rounds, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("moe3d.benchmark.race.time", clock)
    second = Contestant("a", lambda: lambda i: setattr(clock, "now", clock.now + 1), lambda outputs: NO_ERROR)
    assert len(race([second], "cpu", effort)["a"].times) == rounds


def test_the_wrong_the_broken_and_the_absent_get_no_time():
    def refuse(outputs):
        raise Wrong("off by a mile")

    def absent():
        raise Unavailable("no such chip")

    def broken():
        return lambda i: 1 / 0

    log: list = []
    field = [
        contestant("right", log),
        contestant("wrong", log, check=refuse),
        Contestant("absent", absent, lambda outputs: NO_ERROR),
        Contestant("broken", broken, lambda outputs: NO_ERROR),
    ]
    outcomes = race(field, "cpu", SHORT)
    assert outcomes["wrong"].refused == "off by a mile" and not outcomes["wrong"].times
    assert outcomes["broken"].refused == "ZeroDivisionError: division by zero"
    assert outcomes["absent"].skipped == "no such chip"
    assert len(outcomes["right"].times) == 2
    assert Counter(name for name, _ in log) == {"right": 3, "wrong": 1}


def test_a_race_without_anybody_ends():
    assert race([], "cpu", Effort()) == {}


def test_all_plain_peers_and_the_reference_are_right():
    names = [STOCK, STOCK_CACHED, WIDENED, CONCATENATED, CHANNELS_LAST, BY_EXPERT, BY_EXPERT_CACHED, "reference"]
    assert {*names, COMPILED} <= set(peers())
    outcomes = RACES["tail"].run(SMALL, SHORT, names)
    assert {n: o.refused for n, o in outcomes.items()} == dict.fromkeys(outcomes)
    assert all(len(o.times) == 2 and o.error.rms < 1e-5 for o in outcomes.values())


def test_one_expert_and_another_instruction_set_race_where_they_can(monkeypatch):
    asked = []
    run = CPUBackend.forward
    monkeypatch.setattr(CPUBackend, "forward", lambda *args: asked.append(native.isa()) or run(*args))
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    outcomes = RACES["tail"].run(SMALL, SHORT, [ONE_EXPERT])
    assert len(outcomes[ONE_EXPERT].times) == 2 and set(asked) == {"portable"}
    asked.clear()
    outcome = RACES["tail"].run(SMALL, SHORT, [AVX2])[AVX2]
    if "avx2" in native._build.native().module.supported_isas():
        assert len(outcome.times) == 2 and set(asked) == {"avx2"}
    else:
        assert "expected one of" in outcome.skipped
    assert native.isa() == "portable"


def test_no_bfloat16_race_on_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(tail_peers, "has_bf16_products", lambda: False)
    outcomes = RACES["tail"].run(replace(SMALL, precision="bf16"), SHORT, ["cpu", "reference"])
    assert "avx512_bf16" in outcomes["cpu"].skipped and outcomes["reference"].times


def test_no_bfloat16_race_with_an_instruction_set_that_lacks_it():
    outcomes = RACES["tail"].run(replace(SMALL, precision="bf16"), SHORT, [AVX2, "reference"])
    assert outcomes[AVX2].skipped and outcomes["reference"].times


def test_more_frames_than_vggt_takes_at_once():
    outcomes = RACES["tail"].run(Case(9, 14, 14, experts=1), SHORT, [STOCK, "reference"])
    assert all(o.times for o in outcomes.values())


@pytest.mark.parametrize("suite, case", [
    ("tail", SMALL),
    ("mini", replace(SMALL, channels=32)),
])  # fmt: skip
def test_a_wrong_backend_is_refused(suite, case, wrong_backend):
    outcomes = RACES[suite].run(case, SHORT, [STOCK, STOCK_CACHED, BY_EXPERT, "reference", wrong_backend])
    assert outcomes[wrong_backend].times == [] and "wrong: relative RMS error" in outcomes[wrong_backend].refused
    assert outcomes["reference"].times and outcomes["reference"].refused is None


def test_a_wrong_filter_is_refused(monkeypatch):
    case = Case(2, 28, 42, experts=1)
    assert all(o.times and o.error.rms < 1e-3 for o in RACES["sharpen"].run(case, SHORT).values())
    monkeypatch.setitem(sharpening._WAYS, sharpening.COMPILED_FILTER, lambda depth, *_: depth)
    outcomes = RACES["sharpen"].run(case, SHORT)
    assert "wrong: relative RMS error" in outcomes[sharpening.COMPILED_FILTER].refused
    assert outcomes[sharpening.IN_PYTORCH].times


def test_wrong_gradients_are_refused(monkeypatch):
    from moe3d.ops import dispatch
    from moe3d.ops.reference import ReferenceBackend

    class WrongGradients(ReferenceBackend):
        def backward(self, tensors, options, cotangents, needs):
            gradients = super().backward(tensors, options, cotangents, needs)
            return gradients._replace(gate_b2=1.01 * gradients.gate_b2)

    monkeypatch.setitem(dispatch._REGISTRY, "cpu", WrongGradients())
    for suite in ("training", "decoder training"):
        outcomes = RACES[suite].run(SMALL, SHORT, [CONCATENATED, "reference", "cpu"])
        assert outcomes["reference"].times and outcomes["cpu"].refused, suite

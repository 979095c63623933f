"""One run of the benchmarks: measures every race and probe once, and keeps the records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moe3d.benchmark.case import Case, precisions
from moe3d.benchmark.machine import describe
from moe3d.benchmark.probe import first_call, peak_memory
from moe3d.benchmark.race import Effort, Outcome
from moe3d.benchmark.records import Record, records_of
from moe3d.benchmark.roofline import measure_ceilings
from moe3d.benchmark.suites import MEMORY_SUITES, RACES

_ONCE = Effort(seconds=0, least_rounds=1, most_rounds=1)


class Session:
    """Describes the machine and measures its ceilings when it is made.

    Attributes:
        run: the fields of :func:`~moe3d.benchmark.machine.describe`, and "ceilings".
        records: what has been measured so far.
    """

    def __init__(self, device: str, checkout: Path | None = None):
        self.device = device
        self.run = describe(device, checkout)  # before anything else: our own work is not somebody else's load
        self.ceilings = measure_ceilings(device, precisions(device))
        self.run["ceilings"] = dataclasses.asdict(self.ceilings)
        self.records: list[Record] = []
        self._outcomes: dict[tuple, dict[str, Outcome]] = {}

    def race(self, suite: str, case: Case, effort: Effort, names: Sequence[str]) -> dict[str, Outcome]:
        """Outcomes by name; the same race is run only once."""
        key = (suite, case, tuple(names))
        if key not in self._outcomes:
            self._outcomes[key] = RACES[suite].run(case, effort, names)
            self.records += records_of(suite, case, self._outcomes[key], self.run, self.ceilings)
        return self._outcomes[key]

    def memory(self, case: Case, peer: str, race: str = "tail") -> Outcome:
        """The peak memory of a call of the tail, or of what another race calls, in a process of its own."""
        outcome = self._admitted(case, peer, race)
        if outcome.times:
            probed = peak_memory(race, peer, case)
            outcome.times = [probed["seconds"]]
            self._keep(MEMORY_SUITES[race], case, peer, probed["seconds"], peak_bytes=probed["peak_bytes"])
        return outcome

    def latency(self, case: Case, peer: str) -> Outcome:
        """The tail's first call in a fresh process; the outcome's times are those of the cold and the warm one."""
        outcome = self._admitted(case, peer)
        if outcome.times:
            calls = first_call("tail", peer, case)
            outcome.times = [seconds["first_s"] for seconds in calls.values()]
            first = {state: 1e3 * seconds["first_s"] for state, seconds in calls.items()}
            self._keep("latency", case, peer, calls["warm"]["second_s"], first_call_ms=first)
        return outcome

    def _admitted(self, case: Case, peer: str, race: str = "tail") -> Outcome:
        """What a race over a few pixels makes of a peer: only one that is right is probed."""
        few = dataclasses.replace(case, frames=1, height=42, width=42)
        return RACES[race].run(few, _ONCE, [peer])[peer]

    def _keep(self, suite: str, case: Case, peer: str, seconds: float, **measured) -> None:
        ms = 1e3 * seconds
        self.records.append(Record(suite, peer, case.asdict(), self.run, 1, ms, ms, ms, **measured))

"""What has been done so far: one JSON file, whole at every moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

PASSED, FAILED, SKIPPED, RUNNING = "passed", "failed", "skipped", "running"
SCHEMA = 1


class State:
    """{"schema", "commit", "stages": {stage: {item: {"status", "seconds", "reason" or "result", "attempt"}}}}."""

    def __init__(self, path: Path):
        self.path = path
        self.data = {"schema": SCHEMA, "commit": None, "stages": {}}
        if path.is_file():
            self.data = json.loads(path.read_text("utf-8"))

    def entry(self, stage: str, item: str) -> dict | None:
        return self.data["stages"].get(stage, {}).get(item)

    def entries(self, stage: str) -> dict[str, dict]:
        return self.data["stages"].get(stage, {})

    def record(self, stage: str, item: str, **entry) -> None:
        self.data["stages"].setdefault(stage, {})[item] = entry
        self.save()

    def running(self, stage: str) -> str | None:
        """The item during which a worker ended, if one did."""
        return next((item for item, entry in self.entries(stage).items() if entry["status"] == RUNNING), None)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.tmp")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
        os.replace(unfinished, self.path)

    def benchmark_records(self) -> Iterator[dict]:
        """The records, as dictionaries, that the stages measured."""
        for entries in self.data["stages"].values():
            for entry in entries.values():
                yield from (entry.get("result") or {}).get("records", [])

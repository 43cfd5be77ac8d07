"""The store and the running sequences take the memory that they say, whatever ids there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from builders import Bench, admit

from moescope_service.ids import MAX_ID_CHARS

COUNT = 2000
CONSTANT_BYTES = 2 * 2**20
"""What the process may grow by that is no trace's: pools, tables that double."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def growth(bench: Bench, what: str) -> tuple[int, int]:
    """What the process grew by, and by what the collector says that it did."""
    state = bench.collector.state

    def add(number: int) -> None:
        name = f"{number:08}".ljust(MAX_ID_CHARS - 2, "x")
        ids = [f"{name}-{end}" for end in "irq"]
        if what == "finished":
            bench.run(name, ids=ids, internal_id=ids[0])
        elif what == "running":
            bench.register(name, [1] * 1000, ids=ids, internal_id=ids[0])
        else:
            bench.step([(0, 0, 80)], admitted=[admit(0, ids[0], 80, list(range(20)))])
            bench.end()
        state.outbox.clear()

    for number in range(200):  # pools are filled, tables have some room
        add(number)
    before, said = resident_bytes(), state.store.size_bytes + state.sequences.size_bytes
    for number in range(200, 200 + COUNT):
        add(number)
    said = state.store.size_bytes + state.sequences.size_bytes - said
    return resident_bytes() - before, said


def test_it_grows_by_what_the_collector_says():
    """In a process of its own: others' memory is none of it."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    for line in done.stdout.splitlines():
        what, grown, said = line.split()
        assert int(said) > COUNT * MAX_ID_CHARS, what
        assert int(grown) <= 1.5 * int(said) + CONSTANT_BYTES, line
        assert int(said) <= 1.5 * int(grown) + CONSTANT_BYTES, line


if __name__ == "__main__":
    benches = []
    for what in ("finished", "running", "unclaimed"):
        benches.append(Bench(memory_bytes=2**30))
        print(what, *growth(benches[-1], what))

"""Random schedules of a simulated engine: no row is ever wrong, and only lost ones are missing."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
from builders import make_spec
from sim_encoder import SimEncoder

from benchmarks.simulation.engine import VOCABULARY, Engine, truth
from benchmarks.simulation.kv import Seq
from moescope.trace import Source
from moescope.version_runs import MIXED
from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.reassembly import Reassembler
from moescope_service.collector.rows import Rows

SPEC = make_spec(block_size=3)


@dataclasses.dataclass
class Run:
    """Sequences through the engine and the reassembler, to the end."""

    seed: int
    num_blocks: int = 12
    aborts: float = 0.0
    losses: float = 0.0
    pauses: float = 0.0
    gaps: float = 0.0
    surplus: float = 0.0
    copies: bool = False
    changes: float = 0.0
    """How often the weights change, or an update of them begins."""

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.spec = dataclasses.replace(SPEC, num_blocks=self.num_blocks)
        self.engine = Engine(
            rng, self.spec, copies=self.copies, token_budget=rng.choice([4, 9, 30])
        )
        self.encoder = SimEncoder(self.spec)
        self.reassembler = Reassembler(self.spec)
        self.counters = ExpertCounters(self.spec.layers, self.spec.num_experts)
        self.expected = np.zeros_like(self.counters.totals)
        self.ended: dict[str, Rows] = {}
        self.missing: dict[str, set[int]] = {}
        self.seqs: dict[str, Seq] = {}
        self.is_paused = False
        self.version, self.is_updating = 0, False
        arrivals = [self._new_seq(i) for i in range(rng.randint(4, 9))]
        while arrivals or self.engine.is_busy:
            while arrivals and rng.random() < 0.5:
                self.engine.add(arrivals.pop())
            self._abort_some()
            self._step()

    def _new_seq(self, number: int) -> Seq:
        rng = self.rng
        common = [int(t) for t in f"{10**9 + 7 * rng.randrange(2):b}"]  # one of two beginnings
        prompt = common[: rng.randint(1, 14)] + [rng.randrange(VOCABULARY)] * rng.randint(0, 3)
        seq = Seq(str(number), prompt, len(prompt), rng.randint(1, 9), rng.random() < self.surplus)
        self.seqs[seq.name] = seq
        return seq

    def _abort_some(self) -> None:
        for seq in [*self.engine.running, *self.engine.waiting]:
            if self.rng.random() < self.aborts:
                self.engine.abort(seq)

    def _step(self) -> None:
        output = self.engine.schedule()
        self.missing |= output.missing
        self.is_paused ^= self.rng.random() < self.pauses
        lost = "paused" if self.is_paused else None
        if self.rng.random() < self.losses:
            lost = self.rng.choice(["queue_full", "hook_missed"])
        is_gap = self.rng.random() < self.gaps
        if self.changes and self.rng.random() < self.changes:
            self.is_updating = not self.is_updating and self.rng.random() < 0.5
            self.version += not self.is_updating
        version = MIXED if self.is_updating else self.version
        step = self.encoder.encode(output, lost, version)
        self.engine.execute(output, shipped=lost is None and not is_gap)
        if is_gap:
            return
        ended, written = self.reassembler.apply(step)
        self.ended |= dict(ended)
        if written is not None:
            self.counters.add(written)
        if lost is None:
            self._count(output, version)

    def _count(self, output: Any, version: int) -> None:
        num_layers, num_experts = self.expected.shape[1:]
        for seq, start, count in output.batch:
            ids, _ = truth(seq.hashes[start : start + count], self.spec, version)
            is_decode = np.arange(start, start + count)[:, None, None] >= seq.prompt_len
            layer = np.arange(num_layers)[None, :, None]
            flat = (is_decode * num_layers + layer) * num_experts + ids
            counts = np.bincount(flat.ravel(), minlength=self.expected.size)
            self.expected += counts.reshape(self.expected.shape)

    def rows(self, name: str) -> Rows:
        """The rows of an ended sequence, one for each token but the last."""
        return self.ended[name].resized(len(self.seqs[name].tokens) - 1)

    def check_truth(self) -> int:
        """Every row that is there, and its version, is right; returns how many there are."""
        total = self.num_changes = 0
        for name in self.ended:
            rows, seq = self.rows(name), self.seqs[name]
            here = rows.source != Source.MISSING
            ids, weights = truth(seq.hashes[: len(here)], self.spec, rows.weights_version)
            self.num_changes += np.count_nonzero(np.diff(rows.weights_version[here]))
            np.testing.assert_array_equal(rows.topk_ids[here], ids[here])
            np.testing.assert_array_equal(rows.topk_weights[here], weights[here])
            total += int(here.sum())
        return total

    def check_missing(self) -> int:
        """Missing is what was lost, and nothing else; returns how much that is."""
        assert self.ended.keys() == self.seqs.keys()
        for name in self.ended:
            missing = set(np.flatnonzero(self.rows(name).source == Source.MISSING).tolist())
            assert missing == self.missing[name], name
        return sum(map(len, self.missing.values()))


def runs(number: int, seed: int, **chances: Any) -> list[Run]:
    return [Run(seed + i, **chances) for i in range(number)]


def test_every_row_says_which_weights_computed_it():
    """Rows that other weights computed are others: a wrong version is a wrong row."""
    changes = hits = 0
    chances = {"changes": 0.2, "aborts": 0.03, "losses": 0.05, "surplus": 0.3, "copies": True}
    for run in runs(60, 700, num_blocks=30, **chances):
        assert run.check_truth() > 0
        run.check_missing()
        changes += run.num_changes
        hits += sum(
            len(np.unique(rows.weights_version[rows.source == Source.CACHED])) > 1
            for rows in run.ended.values()
        )
    assert changes > 300
    assert hits > 10


def test_without_pressure_every_row_is_there_and_says_where_it_is_from():
    hits = 0
    for run in runs(30, 0, num_blocks=120):
        run.check_truth()
        assert run.check_missing() == 0
        assert run.engine.num_preemptions == 0
        for name, rows in run.ended.items():
            seq = run.seqs[name]
            assert len(rows.source) == len(seq.tokens) - 1
            assert rows.cached_len == seq.cached_len
            cached = np.flatnonzero(rows.source == Source.CACHED)
            assert cached.tolist() == list(range(rows.cached_len))
            hits += rows.cached_len > 0
        np.testing.assert_array_equal(run.counters.totals, run.expected)
    assert hits > 20


def test_hits_on_blocks_that_another_sequence_fills_in_the_same_step_are_found():
    """A chunk of a running or resumed sequence is cached when it is scheduled."""
    same_step = 0
    for run in runs(40, 100, num_blocks=40):
        run.check_truth()
        assert run.check_missing() == 0, f"seed {run.seed}"
        same_step += run.engine.num_same_step_hits
    assert same_step > 20


def test_preemption_and_recomputation_leave_nothing_missing():
    preemptions = 0
    for run in runs(50, 200):
        run.check_truth()
        assert run.check_missing() == 0, f"seed {run.seed}"
        preemptions += run.engine.num_preemptions
        np.testing.assert_array_equal(run.counters.totals, run.expected)
        assert run.counters.totals.sum() == run.counters.rows.sum() * 2 * 2
    assert preemptions > 40


def test_copied_blocks_bring_their_rows():
    copies = 0
    for run in runs(30, 300, num_blocks=20, copies=True):
        run.check_truth()
        assert run.check_missing() == 0, f"seed {run.seed}"
        copies += run.engine.num_copies
    assert copies > 10


@pytest.mark.parametrize(
    "chances",
    [
        {"aborts": 0.05},
        {"surplus": 0.5},
        {"losses": 0.2},
        {"pauses": 0.2},
        {"aborts": 0.05, "losses": 0.1, "pauses": 0.05, "surplus": 0.5, "copies": True},
    ],
    ids=["aborts", "surplus", "losses", "pauses", "all"],
)
def test_missing_is_what_was_lost_and_nothing_else(chances: dict[str, Any]):
    present = missing = 0
    for run in runs(25, 400, **chances):
        present += run.check_truth()
        missing += run.check_missing()
        np.testing.assert_array_equal(run.counters.totals, run.expected)
    assert present > 500
    assert missing > 10 or chances.keys() == {"surplus"}


def test_after_a_gap_no_row_is_wrong():
    gaps = present = 0
    for run in runs(60, 500, gaps=0.1, aborts=0.02, losses=0.05, surplus=0.3, copies=True):
        present += run.check_truth()
        gaps += run.reassembler.gaps
        for name, rows in run.ended.items():
            missing = set(np.flatnonzero(run.rows(name).source == Source.MISSING).tolist())
            assert missing >= run.missing.get(name, set()), (run.seed, name, len(rows.source))
    assert gaps > 60
    assert present > 500

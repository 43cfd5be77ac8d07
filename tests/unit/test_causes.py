"""Why rows of traces are missing."""

from __future__ import annotations

import pytest
from builders import (
    Bench,
    admit,
    make_spec,
)

from moescope_service.collector.sequences import WORKER_TIMEOUT_S
from moescope_service.queries import MetricsQuery


@pytest.fixture
def bench():
    return Bench()


class TestCauses:
    """Why rows are missing, in the metrics."""

    def missing(self, bench):
        return {k: n for k, n in bench.answered(MetricsQuery()).missing.items() if n}

    def test_a_whole_trace_misses_nothing(self, bench):
        bench.run("a")
        assert self.missing(bench) == {}
        assert bench.answered(MetricsQuery()).trace_rows == {"computed": 5}

    @pytest.mark.parametrize("reason", ["queue_full", "paused", "hook_missed"])
    def test_rows_that_were_lost_on_the_way(self, bench, reason):
        bench.register("a")
        bench.step([(0, 0, 4)], admitted=[admit(0, "a-i", 4, [0, 1])])
        bench.step([(0, 4, 1)], lost=reason)
        bench.finish("a-i")
        bench.end()
        assert self.missing(bench) == {reason: 1}
        rows = bench.answered(MetricsQuery()).trace_rows
        assert rows == {"computed": 4, "cached": 0, "missing": 1}

    def test_a_hit_on_a_block_whose_rows_never_came(self, bench):
        bench.register("a")
        bench.step([(0, 4, 1)], admitted=[admit(0, "a-i", 5, [7, 8], cached=4)])
        bench.finish("a-i", output=[9])
        bench.end()
        assert self.missing(bench) == {"not_captured": 4}

    @pytest.mark.parametrize("reason", ["stop", "abort"])
    def test_steps_that_were_lost_altogether(self, bench, reason):
        bench.start("a")
        bench.lose_step()
        bench.finish("a-i", reason=reason)
        bench.end()
        assert bench.traces("a")[0].coverage == 0
        assert self.missing(bench) == {"not_captured": 5}

    def test_a_block_that_went_to_another_sequence(self, bench):
        bench.start("a")
        bench.step([(1, 0, 4)], admitted=[admit(1, "b-i", 4, [0])])
        bench.finish("a-i")
        bench.end(0)
        assert self.missing(bench) == {"overwritten": 4}

    def test_a_worker_that_never_said_how_it_ended(self, bench):
        bench.start("a")
        bench.finish("a-i")
        bench.pass_s(WORKER_TIMEOUT_S)
        assert self.missing(bench) == {"unknown": 5}

    def test_a_prompt_that_was_aborted_before_it_was_routed(self, bench):
        bench.register("a")
        bench.step([(0, 0, 2)], admitted=[admit(0, "a-i", 4, [0, 1])])
        bench.finish("a-i", reason="abort", output=[])
        bench.end()
        assert self.missing(bench) == {"not_routed": 1}
        assert bench.answered(MetricsQuery()).incomplete == {"not_routed": 1}
        assert bench.answered(MetricsQuery()).traces == {"incomplete": 1}

    def test_traces_count_once_at_each_cause(self, bench):
        bench.register("a")
        bench.step([(0, 0, 2)], admitted=[admit(0, "a-i", 4, [0, 1])], lost="paused")
        bench.step([(0, 2, 1)], lost="queue_full")
        bench.finish("a-i", reason="abort", output=[7])
        bench.end()
        assert self.missing(bench) == {"paused": 2, "queue_full": 1, "not_routed": 1}
        incomplete = bench.answered(MetricsQuery()).incomplete
        assert incomplete == {"paused": 1, "queue_full": 1, "not_routed": 1}

    def test_a_trace_that_lacks_nothing_but_its_end(self, bench):
        bench.register("a", prompt=(1,))
        bench.finish("a-i", output=[])
        bench.pass_s(WORKER_TIMEOUT_S)
        assert self.missing(bench) == {}
        assert bench.answered(MetricsQuery()).incomplete == {"unknown": 1}

    def test_an_abort_that_its_worker_never_reported(self, bench):
        bench.start("a")
        bench.finish("a-i", reason="abort")
        bench.pass_s(WORKER_TIMEOUT_S)
        assert self.missing(bench) == {"unknown": 5}

    def test_a_hit_that_came_through_a_kv_connector(self):
        bench = Bench(make_spec(trust_prefix_hits=False))
        bench.run("first")
        bench.register("a")
        bench.step([(0, 4, 1)], admitted=[admit(0, "a-i", 5, [0, 8], cached=4)])
        bench.finish("a-i", output=[9])
        bench.end()
        assert self.missing(bench) == {"not_captured": 4}

"""A summary has what tables show, and every committed one says what its own rounds say."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from benchmarks import summarize
from benchmarks.summarize import METRICS, REST
from moescope.overhead import comparison
from moescope.overhead.rounds import Pass, Round

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def committed():
    """(name, what was measured) of every comparison in a committed summary."""
    for path in sorted(RESULTS.rglob("*.json")):
        values = orjson.loads(path.read_bytes())
        if "by_round" in values:
            yield path.stem, values
        if "sittings" in values:
            for load, by_sitting in values["loads"].items():
                for sitting, one in by_sitting.items():
                    yield f"{path.stem}, {load}, {sitting}", one


COMMITTED = dict(committed())


def rounds_of(by_round, metric):
    first = next(iter(by_round.values()))
    return [
        Round(
            order=tuple(by_round),
            passes={
                arm: Pass(
                    wall_s=1.0,
                    prompt_tokens=0,
                    completion_tokens=0,
                    metrics={metric: values[metric][number]},
                    token_ids=[],
                )
                for arm, values in by_round.items()
            },
        )
        for number in range(len(first[metric]))
    ]


def test_there_are_summaries():
    assert len(COMMITTED) > 20
    assert any("one_server" in name for name in COMMITTED)


@pytest.mark.parametrize("name", COMMITTED)
def test_differences_are_those_of_the_rounds(name):
    """Rounds have five digits, and the interval depends a little on the draws of the bootstrap."""
    measured = COMMITTED[name]
    first = next(iter(measured["by_round"].values()))
    for metric in first:
        made = comparison.differences(rounds_of(measured["by_round"], metric), 0)
        for arm, by_metric in made.items():
            stated = measured["differences"][arm][metric]
            again = by_metric[metric].as_json()
            assert again["percent"] == pytest.approx(stated["percent"], abs=0.01, rel=1e-3)
            low, high = stated["claim_percent"]
            wanted = pytest.approx([low, high], abs=0.02 + 0.03 * (high - low))
            assert [*again["claim_percent"]] == wanted, f"{arm}, {metric}"


def metrics(value):
    return {**dict.fromkeys(METRICS, value), "p99_itl_ms": value, "request_throughput": value}


def test_a_sitting_keeps_the_figures_of_each_round_and_drops_the_passes():
    made = {"metrics": metrics(1.2345678), "counted": {"steps": 1}}
    measured = {
        "complete": True,
        "rounds": 2,
        "arms": {"stock": {"median": metrics(1.0), "steps": 7}},
        "differences": {"moescope": {"s_per_token": {"percent": 1.0}, "p99_itl_ms": {}}},
        "passes": [{"order": ["stock"], "stock": made}] * 2,
    }
    raw = {"date": "x", "sittings": {"a": {}}, "loads": {"batch 1": {"a": measured}}}
    one = summarize.summarize(raw)["loads"]["batch 1"]["a"]
    assert one["by_round"]["stock"] == {metric: [1.2346, 1.2346] for metric in METRICS}
    assert one["arms"]["stock"] == {"median": dict.fromkeys(METRICS, 1.0), "steps": 7}
    assert one["differences"] == {"moescope": {"s_per_token": {"percent": 1.0}}}
    assert "passes" not in one
    assert summarize.summarize(summarize.summarize(raw)) == summarize.summarize(raw)


def test_a_timing_json_keeps_all_differences():
    rounds = [{"round": 1, "order": ["stock"], "stock": {"wall_s": 1.0, "metrics": metrics(2.0)}}]
    raw = {"differences": {"moescope": metrics(1.0)}, "rounds": rounds}
    made = summarize.summarize(raw)
    assert made["rounds"] == 1
    assert made["differences"] == raw["differences"]
    assert made["by_round"] == {"stock": {metric: [2.0] for metric in METRICS}}


def test_kernels_are_medians_and_small_ones_are_summed_up():
    def one(period, us):
        kernels = {"gemm": {"runs": 2.0, "us": us}, "tiny": {"runs": 1.0, "us": 0.001}}
        return {"steps": 10, "period": period, "rest": 1.0, "kernels": kernels}

    raw = {"kernels": {"batch 1": {"stock": [one(10.0, 5.0), one(12.0, 6.0), one(30.0, 9.0)]},
                       "refused": {"counts": "no room"}}}  # fmt: skip
    made = summarize.summarize(raw)["kernels"]
    assert made["refused"] == {"counts": "no room"}
    assert made["batch 1"]["stock"] == {
        "passes": 3,
        "steps": 30,
        "period": 12.0,
        "rest": 1.0,
        "period_by_pass": [10.0, 12.0, 30.0],
        "kernels": {"gemm": {"runs": 2.0, "us": 6.0}, REST: {"runs": 1.0, "us": 0.001}},
    }


def test_the_text_is_json_again_in_short_lines(tmp_path):
    raw = tmp_path / "raw.json"
    raw.write_bytes(orjson.dumps({"a": [0.123456789] * 100, "b": {"c": [{"d": "x" * 200}]}}))
    summarize.write(raw, tmp_path / "out" / "made.json", "abc")
    text = (tmp_path / "out" / "made.json").read_text()
    values = orjson.loads(text)
    assert values == {"commit": "abc", "a": [0.12346] * 100, "b": {"c": [{"d": "x" * 200}]}}
    assert max(len(line) for line in text.splitlines() if "xxx" not in line) <= 150
    assert len(text.splitlines()) < 30

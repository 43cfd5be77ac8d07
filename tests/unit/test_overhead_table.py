"""The tables and the picture of what the capture costs say what the result files hold."""

from __future__ import annotations

import orjson
import pytest

from benchmarks.gpu import overhead_table
from benchmarks.gpu.loads import ENGINE_ITL, TPOT, WALL, workloads
from benchmarks.gpu.overhead_table import BEGIN, END, verdict
from moescope.errors import FormatError

BATCH_1, DECODE = (one.name for one in workloads()[:2])
PREFILL = next(one.name for one in workloads() if one.name.startswith("prefill"))


def difference(percent, low, high, *, noise=0.0):
    claim = min(low, percent - noise), max(high, percent + noise)
    return {
        "percent": percent,
        "claim_percent": claim,
        "noise_percent": noise or None,
        "distinguishable": not claim[0] <= 0.0 <= claim[1],
    }


def measured(*, rounds=5, complete=True, hook_us=42.3, first="stock", **by_arm):
    """What a sitting measured: the same difference in every metric that is shown."""
    names = {name.replace("_", "-"): one for name, one in by_arm.items()}
    median = {
        TPOT: 2.571,
        "output_throughput": 6253.4,
        "prompt_throughput": 82856.9,
    }
    return {
        "rounds": rounds,
        "complete": complete,
        "arms": {
            name: {
                "median": median,
                "hook_us_per_step": hook_us if name != first else None,
                "rows_captured": 1_000 if name != first else 0,
                "rows_lost": 3 if name != first else 0,
            }
            for name in (first, *names)
        },
        "differences": {
            name: dict.fromkeys((TPOT, WALL, ENGINE_ITL), one) for name, one in names.items()
        },
    }


def result(tmp_path, name="result.json", **loads):
    """A file of loads by name, and in them of sittings by date."""
    dates = {date for by_sitting in loads.values() for date in by_sitting}
    values = {
        "sittings": {
            date: {
                "date": f"{date}T12:00:00+00:00",
                "model": "shape",
                "hardware": {"gpu": "NVIDIA H200, 143771 MiB, 580.1", "cpu": "x"},
                "versions": {"vllm": "0.32.0"},
            }
            for date in dates
        },
        "loads": loads,
    }
    path = tmp_path / name
    path.write_bytes(orjson.dumps(values))
    return path


AGAIN = difference(0.3, -0.4, 0.6)


def table_of(*paths):
    return overhead_table.make_tables(*overhead_table.read(paths))


def test_a_row_says_what_was_measured(tmp_path):
    one = measured(stock_again=AGAIN, moescope=difference(-0.5, -0.6, 0.4))
    prefill = measured(stock_again=AGAIN, moescope=difference(-0.5, -0.6, 0.4))
    for by_metric in prefill["differences"].values():
        del by_metric[ENGINE_ITL]  # one token is not between two
    path = result(tmp_path, **{PREFILL: {"2026-01-02": prefill}, BATCH_1: {"2026-01-02": one}})
    lines = table_of(path).splitlines()
    both = "+0.30% [−0.40, +0.60] | −0.50% [−0.60, +0.40]"  # noqa: RUF001
    none = "\N{EN DASH} | \N{EN DASH}"
    assert lines[0].startswith("Servers of their own, ")
    assert lines[4:6] == [
        f"| {BATCH_1} | H200 | 5 | 2.57 ms a token | {both} | 0.5% | within | {both} | 42 |",
        f"| {PREFILL} | H200 | 5 | 82,857 prompt tokens/s | {both} | 0.5% | within | {none} | 42 |",
    ]
    where = "shape on NVIDIA H200, vLLM 0.32.0, 2026-01-02."
    assert f"{where} Rows captured meanwhile: 2,000; lost: 6." in lines
    assert "counts" not in table_of(path)


def test_arms_of_one_server_have_a_table_of_their_own(tmp_path):
    one = measured(first="detached", detached_again=AGAIN, moescope=AGAIN, paused=AGAIN)
    own = measured(moescope=difference(9.0, 9.0, 9.0))
    text = table_of(result(tmp_path, **{DECODE: {"2026-01-01": one, "2026-01-02": own}}))
    first, second = text.split("Servers of their own, ")
    assert first.startswith("One server, ")
    assert "| load | GPU | rounds | detached | detached-again | moescope |" in first
    assert "| load | GPU | paused |" in first
    assert "+9.00%" not in first
    assert "| load | GPU | rounds | stock | stock-again | moescope |" in second
    assert f"| {DECODE} | H200 | 5 | 2.57 ms a token | \N{EN DASH} | +9.00%" in second


@pytest.mark.parametrize(
    ("percent", "low", "high", "wanted"),
    [
        (0.2, -0.3, 0.9, "within"),
        (-3.0, -4.0, -2.0, "within"),
        (1.0, 0.9, 1.0, "within"),
        (0.9, 0.5, 1.3, "open"),
        (1.1, 0.5, 1.7, "open"),
        (1.5, 1.1, 1.9, "missed"),
        (5.0, 4.0, 6.0, "missed"),
        (0.5, -1.0, 2.0, "open"),
        (4.0, -1.0, 9.0, "open"),
    ],
)
def test_a_verdict_follows_the_interval_that_is_claimed(percent, low, high, wanted):
    assert verdict(difference(percent, low, high), 1.0) == wanted


def test_noise_leaves_a_verdict_open():
    assert verdict(difference(1.5, 1.4, 1.6), 1.0) == "missed"
    assert verdict(difference(1.5, 1.4, 1.6, noise=2.0), 1.0) == "open"


def test_the_latest_sitting_of_an_arm_counts(tmp_path):
    sittings = {
        "2026-01-01": measured(stock_again=AGAIN, moescope=difference(1.0, 1.0, 1.0)),
        "2026-01-02": measured(
            stock_again=difference(2.0, 2.0, 2.0), moescope=difference(3.0, 3.0, 3.0)
        ),
        "2026-01-03": measured(
            stock_again=difference(8.0, 8.0, 8.0), counts=difference(4.0, 4.0, 4.0)
        ),
        "2026-01-04": measured(paused=difference(5.0, 5.0, 5.0), first="counts"),  # no stock
        "2026-01-05": measured(moescope=difference(6.0, 6.0, 6.0), rounds=2),  # too few
        "2026-01-06": measured(moescope=difference(7.0, 7.0, 7.0), complete=False),
    }
    text = table_of(result(tmp_path, **{DECODE: sittings}))
    both = "+2.00% [+2.00, +2.00] | +3.00% [+3.00, +3.00]"
    assert f"| {both} | 0.5% | missed | {both} |" in text
    assert f"\n| --- | --- | --- |\n| {DECODE} | H200 | +4.00% [+4.00, +4.00], 5 rounds |" in text


def test_a_later_file_adds_to_an_earlier_one(tmp_path):
    first = result(tmp_path, **{DECODE: {"2026-01-01": measured(moescope=AGAIN)}})
    other = result(
        tmp_path,
        "other.json",
        **{
            f"{DECODE}, 8 at a time": {"2026-01-02": measured(moescope=AGAIN)},
            DECODE: {"2026-01-02": measured(paused=AGAIN)},
        },
    )
    text = table_of(first, other)
    assert [line.split(" | ")[0] for line in text.splitlines() if "ms a token" in line] == [
        f"| {DECODE}",
        f"| {DECODE}, 8 at a time",
    ]
    assert "| load | GPU | paused |" in text
    assert "2026-01-01 to 2026-01-02." in text


def test_sittings_of_the_same_second_are_not_confused(tmp_path):
    first = result(tmp_path, **{DECODE: {"2026-01-01": measured(moescope=AGAIN)}})
    values = orjson.loads(first.read_bytes())
    values["loads"] = {BATCH_1: {"2026-01-01": measured(moescope=AGAIN)}}
    values["sittings"]["2026-01-01"]["hardware"]["gpu"] = "NVIDIA H100, 1 MiB"
    other = tmp_path / "other.json"
    other.write_bytes(orjson.dumps(values))
    text = table_of(first, other)
    assert f"| {DECODE} | H200 |" in text
    assert f"| {BATCH_1} | H100 |" in text
    assert "shape on NVIDIA H100, NVIDIA H200, vLLM" in text


def test_a_file_of_another_kind_is_told(tmp_path):
    old = tmp_path / "old.json"
    old.write_bytes(orjson.dumps({"throughput": {}}))
    with pytest.raises(FormatError, match="holds no loads by sitting"):
        overhead_table.read([old])
    with pytest.raises(FormatError, match="'batch 9' is none of the loads"):
        overhead_table.read([result(tmp_path, **{"batch 9": {}})])
    cut_off = measured(moescope=AGAIN, rounds=2)
    with pytest.raises(FormatError, match="no sitting has 3 rounds"):
        overhead_table.read([result(tmp_path, **{DECODE: {"2026-01-01": cut_off}})])


def test_the_table_takes_the_place_between_the_markers():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = overhead_table.replace_block(text, "| new |")
    assert once == f"before\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    assert overhead_table.replace_block(once, "| new |") == once
    for wrong in ("no markers", f"{END} {BEGIN}", f"{text}{text}", BEGIN):
        with pytest.raises(FormatError, match="once each"):
            overhead_table.replace_block(wrong, "| new |")


def test_the_picture_is_drawn_where_arms_lack_loads(tmp_path):
    path = result(
        tmp_path,
        **{
            BATCH_1: {"2026-01-01": measured(stock_again=AGAIN, moescope=AGAIN)},
            DECODE: {"2026-01-02": measured(counts=difference(4.0, 3.0, 5.0))},
        },
    )
    overhead_table.draw(tmp_path / "overhead.png", *overhead_table.read([path]))
    assert (tmp_path / "overhead.png").stat().st_size > 10_000

"""The file of a comparison, written round by round."""

import contextlib
import io
import itertools
import signal

import pytest
from overhead_fakes import OPTIONS, chat, paired, serving_all
from rich.console import Console

from moescope import CommandError, stages
from moescope.errors import StoppedError
from moescope.overhead import comparison, engine, hosting, plot, table, timing
from moescope.overhead.arms import MOESCOPE, STOCK_AGAIN, Arm
from moescope.run_dir import RunDir


def test_the_file_keeps_its_two_first_keys_and_the_overhead():
    values = timing.summarize(paired(again=[0.0] * 3, moescope=[25.0] * 3), 0)
    assert values["no_log"] == pytest.approx(
        {"wall_s": 3.0, "prompt_tokens": 3, "completion_tokens": 3, "tokens_per_s": 1.0}
    )
    assert values["log"]["tokens_per_s"] == pytest.approx(0.8)
    assert values["overhead"]["percent"] == pytest.approx(25.0)
    plain = {name: values["overhead"][name] for name in timing.PLAIN}
    assert plain == pytest.approx({
        "wall_s": 0.75, "wall_s_percent": 25.0,
        "completion_tokens": 0, "completion_tokens_percent": 0.0,
        "tokens_per_s": -0.2, "tokens_per_s_percent": -20.0,
    })  # fmt: skip
    assert "capture changes the wall time per token by +25.00%" in values["overhead"]["statement"]
    assert [item["round"] for item in values["rounds"]] == [1, 2, 3]
    assert values["arms"][MOESCOPE]["metrics"]["mean_ttft_ms"] == pytest.approx(1.25)
    assert list(values["differences"]) == [STOCK_AGAIN, MOESCOPE]


def test_entries_are_left_out_where_their_arms_are_not_there():
    alone = timing.summarize(paired(moescope=[1.0] * 3), 0)
    assert "the noise of the run is not known" in timing.statements(alone)[-1]
    assert alone["overhead"]["wall_s"] == pytest.approx(0.03)
    values = timing.summarize(paired(again=[1.0] * 3), 0)
    assert len(timing.statements(values)) == 1
    assert not {"no_log", "log", "overhead"} & set(values)


@contextlib.contextmanager
def two_arms(scripts, refused=None):
    names = {name: Arm(name=name) for name in ("a", "b")}
    with serving_all(names, scripts) as (servers, urls):
        for name, script in scripts.items():
            script.server = servers[name]
        yield hosting.StartedArms(
            arms=[Arm(name=name, url=urls[name]) for name in names],
            arrangement=hosting.SideBySide(urls),
            refused=refused or {},
            commands=urls,
        )


def run_timing(path, scripts=None, *, count=2, refused=None, on_pass=lambda: None):
    with two_arms(scripts or {}, refused) as started:
        plan = timing.TimingPlan(prompts=["x"], options=OPTIONS, rounds=count)
        return timing.run(path, plan, started, on_pass)


def test_the_file_is_written_after_every_round(tmp_path):
    path = tmp_path / "timing.json"

    def script(number, body):  # fails in the second round that counts: warm-up, one, two
        return chat() if number < 2 else [500, b""]

    assert not timing.is_finished(path)
    with pytest.raises(CommandError, match="requests"):
        run_timing(path, {"b": script}, count=3)
    assert not timing.is_finished(path)
    values = timing.read(path)
    assert len(values["rounds"]) == 1
    assert values["complete"] is False
    whole = run_timing(path, refused={"c": "c: no"})
    assert whole["complete"] is True
    assert whole["placement"] == "together"
    assert timing.read(path)["refused"] == {"c": "c: no"}
    assert timing.statements(whole)[0].startswith("b changes the wall time per token by ")
    plot.draw(tmp_path / "o.png", whole)
    assert (tmp_path / "o.png").stat().st_size > 10_000
    assert table.render(whole).row_count == len(comparison.METRICS) - 1  # no engine's clock
    assert [one.name for one in tmp_path.iterdir()] != []


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_picture_of_before_goes_with_its_figures(tmp_path, rounds):
    run = RunDir(tmp_path)

    def script(number, body):  # the warm-up comes first
        return chat() if number <= rounds else [500, b""]

    def compare(scripts):
        with two_arms(scripts) as started:
            stages.measure_overhead(
                run,
                ["x"],
                started,
                options=OPTIONS,
                rounds=3,
                api_key=None,
                console=Console(file=io.StringIO()),
            )

    compare({})
    with pytest.raises(CommandError, match="requests"):
        compare({"b": script})
    assert timing.is_finished(run.timing) == run.overhead.exists() == (not rounds)


@pytest.mark.parametrize(("passes", "rounds"), [(2, 0), (5, 1)])  # the warm-up has two passes
def test_ctrl_c_says_what_is_kept(tmp_path, passes, rounds):
    path, done = tmp_path / "timing.json", itertools.count(1)

    def on_pass():
        if next(done) == passes:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises((StoppedError, KeyboardInterrupt)) as raised:
        run_timing(path, count=3, on_pass=on_pass)
    assert path.exists() == bool(rounds)
    assert str(raised.value) == (f"stopped: 1 of 3 rounds are in {path}" if rounds else "")


@pytest.mark.parametrize("width", [60, 80])
def test_no_figure_of_the_table_is_wrapped(width):
    one = {
        "percent": -102.4,
        "claim_percent": (-110.4, 126.1),
        "noise_percent": 1.0,
        "distinguishable": False,
    }
    arms = ("stock-again", "moescope", "counts", "paused", "routed-experts")
    values = {
        "arms": dict.fromkeys(("stock", *arms)),
        "differences": dict.fromkeys(arms, dict.fromkeys(comparison.METRICS, one)),
    }
    console = Console(width=width, file=io.StringIO(), soft_wrap=True)
    console.print(table.render(values))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    whole = [line for line in lines if line.endswith("-102.4   [-110.4, +126.1]   n.d.  ")]
    assert len(whole) == len(arms) * len(comparison.METRICS)


def metered(itl_s):
    """A script of a server whose engine says how long it had between two tokens."""

    def script(number, body):
        script.server.pages["/metrics"] = (
            f'vllm:inter_token_latency_seconds_sum{{model_name="demo"}} {(number + 1) * itl_s}\n'
            f'vllm:inter_token_latency_seconds_count{{model_name="demo"}} {number + 1}\n'
        ).encode()
        return chat()

    return script


def test_the_engines_clock_stands_beside_the_clients(tmp_path):
    scripts = {"a": metered(0.010), "b": metered(0.012)}
    values = run_timing(tmp_path / "timing.json", scripts, count=3)
    assert values["arms"]["a"]["metrics"][engine.ITL] == pytest.approx(10.0)
    assert [item["b"]["metrics"][engine.ITL] for item in values["rounds"]] == pytest.approx(
        [12.0] * 3
    )
    client, by_engine, _ = timing.statements(values)
    assert client.startswith("b changes the wall time per token by ")
    assert by_engine.startswith("b changes the ITL, mean, engine's clock by +20.00% ")
    assert table.render(values).row_count == len(comparison.METRICS)
    plot.draw(tmp_path / "o.png", values)


def test_a_server_without_metrics_has_no_engines_clock(tmp_path):
    values = run_timing(tmp_path / "timing.json", {"a": metered(0.010)})
    assert engine.ITL not in values["differences"]["b"]
    assert values["arms"]["a"]["metrics"][engine.ITL] == pytest.approx(10.0)


def test_any_number_of_arms_is_drawn(tmp_path):
    (by_metric,) = timing.summarize(paired(moescope=[1.0] * 3), 0)["differences"].values()
    differences = {f"arm {number}": by_metric for number in range(9)}
    plot.draw_differences(
        tmp_path / "o.png", differences, labels=comparison.METRICS, xlabel="percent", title="many"
    )
    assert (tmp_path / "o.png").stat().st_size > 10_000


@pytest.mark.parametrize(("widest", "is_cut"), [(2.0, False), (90.0, True)])
def test_a_picture_says_that_it_cuts_lines_off(widest, is_cut, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plot.Axes, "set_title", lambda axes, title, **_: titles.append(title))
    ends = dict(zip(comparison.METRICS, (1.0, 1.0, widest), strict=False))
    by_row = {
        row: {"percent": 0.0, "claim_percent": [-end, end], "noise_percent": None,
              "distinguishable": False}
        for row, end in ends.items()
    }  # fmt: skip
    rows = {row: row for row in ends}
    plot.draw_differences(tmp_path / "o.png", {"one": by_row}, rows, xlabel="percent", title="some")
    assert ("beyond" in titles[0]) is is_cut

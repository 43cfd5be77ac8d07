"""The file of a comparison, written round by round."""

import pytest
from overhead_fakes import OPTIONS, chat, paired, serving_all

from moescope import CommandError
from moescope.overhead import comparison, hosting, plot, table, timing
from moescope.overhead.arms import MOESCOPE, STOCK_AGAIN, Arm


def test_the_file_keeps_the_two_rows_and_the_overhead():
    values = timing.summarize(paired(again=[0.0] * 3, moescope=[25.0] * 3), 0)
    assert values["no_log"] == pytest.approx(
        {"wall_s": 3.0, "prompt_tokens": 3, "completion_tokens": 3, "tokens_per_s": 1.0}
    )
    assert values["log"]["tokens_per_s"] == pytest.approx(0.8)
    assert values["overhead"]["percent"] == pytest.approx(25.0)
    assert "capture changes the wall time per token by +25.00%" in values["overhead"]["statement"]
    assert [item["round"] for item in values["rounds"]] == [1, 2, 3]
    assert values["arms"][MOESCOPE]["metrics"]["mean_ttft_ms"] == pytest.approx(1.25)
    assert list(values["differences"]) == [STOCK_AGAIN, MOESCOPE]


def test_rows_are_left_out_where_their_arms_are_not_there():
    alone = timing.summarize(paired(moescope=[1.0] * 3), 0)
    assert "the noise of the run is not known" in timing.statements(alone)[-1]
    values = timing.summarize(paired(again=[1.0] * 3), 0)
    assert len(timing.statements(values)) == 1
    assert not {"no_log", "log", "overhead"} & set(values)


def run_timing(path, scripts=None, *, count=2, refused=None):
    names = {name: Arm(name=name) for name in ("a", "b")}
    with serving_all(names, scripts or {}) as (_, urls):
        setting = timing.Setting(
            prompts=["x"],
            arms=[Arm(name=name, url=urls[name]) for name in names],
            options=OPTIONS,
            rounds=count,
        )
        hosted = hosting.Hosted(hosting.Running(urls), list(names), refused or {})
        return timing.run(path, setting, hosted, urls)


def test_the_file_is_written_after_every_round(tmp_path):
    path = tmp_path / "timing.json"

    def script(number, body):  # fails in the second round that counts: warm-up, one, two
        return chat() if number < 2 else [500, b""]

    with pytest.raises(CommandError, match="requests"):
        run_timing(path, {"b": script}, count=3)
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
    assert table.render(whole).row_count == len(comparison.METRICS)
    assert [one.name for one in tmp_path.iterdir()] != []


def test_any_number_of_arms_is_drawn(tmp_path):
    (by_metric,) = timing.summarize(paired(moescope=[1.0] * 3), 0)["differences"].values()
    differences = {f"arm {number}": by_metric for number in range(9)}
    plot.draw_rows(
        tmp_path / "o.png", differences, rows=comparison.METRICS, xlabel="percent", title="many"
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
    plot.draw_rows(tmp_path / "o.png", {"one": by_row}, rows, xlabel="percent", title="some")
    assert ("beyond" in titles[0]) is is_cut

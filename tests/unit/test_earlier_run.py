"""What an earlier run left is kept by every command that fills a run directory."""

import orjson
import pytest

from moescope import CommandError, FormatError, earlier_run, replay
from moescope.cli import main
from moescope.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def fill(run_dir, *, answered=True, complete=None):
    """Leave what a replay and, if asked for, a comparison leave."""
    error = None if answered else "HTTP 500"
    response = replay.Response(index=0, prompt="a", started_s=0.0, latency_s=1.0, error=error)
    replay.write_responses(run_dir.responses, [response])
    run_dir.prompts.write_text("a\n")
    if complete is not None:
        run_dir.timing.write_bytes(orjson.dumps({"differences": {}, "complete": complete}))


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["demo"], {"answered": True}),
        (["demo"], {"answered": False, "complete": True}),
        (["demo"], {"answered": False}),  # other prompts
        (["overhead"], {"complete": True}),
    ],
)
def test_nothing_is_replaced_without_force(run_dir, capsys, argv, what):
    fill(run_dir, **what)
    before = {path: path.read_bytes() for path in run_dir.path.iterdir()}
    assert main([*argv, "--run-dir", str(run_dir.path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"moescope: {run_dir.path}/")
    assert "--force replaces" in err
    assert {path: path.read_bytes() for path in run_dir.path.iterdir()} == before


def test_what_is_not_finished_may_be_replaced(run_dir):
    earlier_run.require_prompts(run_dir, ["a"])
    earlier_run.require_no_answers(run_dir)
    earlier_run.require_no_comparison(run_dir)
    fill(run_dir, answered=False, complete=False)
    earlier_run.require_prompts(run_dir, ["a"])
    earlier_run.require_no_answers(run_dir)
    earlier_run.require_no_comparison(run_dir)


def test_what_cannot_be_read_is_kept_too(run_dir):
    run_dir.responses.write_text("mine")
    with pytest.raises(FormatError, match=r"responses\.jsonl"):
        earlier_run.require_no_answers(run_dir)
    run_dir.timing.write_text("mine")
    with pytest.raises(FormatError, match=r"timing\.json"):
        earlier_run.require_no_comparison(run_dir)


def test_a_directory_is_checked_and_not_made(tmp_path):
    RunDir(tmp_path / "a" / "b").check()
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CommandError, match="file is not a directory"):
            RunDir(path).check()

"""``moescope bench`` as a command."""

import io
import signal
import subprocess
import sys
import threading

import orjson
import pytest
from rich.console import Console
from stream_server import WAIT, answer, chunk, serving
from test_cli import run

from moescope import ServerError
from moescope.bench import live, session
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.record import Record
from moescope.bench.workload import Ask, Turn


def bench(url, *argv):
    return run("bench", "--base-url", url, "--model", "m", "--endpoint", "completions", *argv)


def test_a_run_writes_its_files_and_shows_its_figures(tmp_path, capsys):
    result, plot = tmp_path / "new" / "r.json", tmp_path / "r.png"
    with serving(lambda number, body: answer(4, 0.002)) as server:
        status = bench(
            server.url, "--num-prompts", 6, "--num-warmups", 2, "--request-rate", 100,
            "--goodput", "e2el:10000", "--result", result, "--save-detailed", "--plot", plot,
        )  # fmt: skip
    assert status == 0
    assert len(server.seen) == 8
    values = orjson.loads(result.read_bytes())
    assert (values["completed"], values["failed"]) == (6, 0)
    assert values["total_output_tokens"] == 24
    assert values["request_goodput"] == pytest.approx(values["request_throughput"])
    assert len(values["itls"]) == 6
    assert values["moescope"]["options"]["dataset_name"] == "sample"
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "requests completed" in out
    assert str(result) in out


def test_random_prompts_are_token_ids_with_answers_of_fixed_length(tmp_path):
    with serving(lambda number, body: answer()) as server:
        status = run(
            "bench", "--base-url", server.url, "--model", "m", "--dataset-name", "random",
            "--num-prompts", 2, "--input-len", 9, "--output-len", 5, "--max-concurrency", 1,
        )  # fmt: skip
    assert status == 0
    for seen in server.seen:
        assert len(seen.body["prompt"]) == 9
        assert (seen.body["max_tokens"], seen.body["ignore_eos"]) == (5, True)


def test_not_one_answer_is_status_1(capsys):
    with serving(lambda number, body: [429, b'{"error": {"message": "slow down"}}']) as server:
        assert bench(server.url, "--num-prompts", 2, "--max-concurrency", 1) == 1
    out, err = capsys.readouterr()
    assert "http_429: 2" in out
    assert err == "moescope: no request was answered: HTTP 429: slow down\n"


def test_a_failed_warm_up_ends_it(capsys):
    with serving(lambda number, body: [500, b"oops"]) as server:
        assert bench(server.url, "--num-prompts", 2, "--num-warmups", 1) == 1
    assert "1 of 1 requests of the warm-up failed" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_what_was_measured(tmp_path):
    result, waiting = tmp_path / "r.json", threading.Event()

    def script(number, body):
        if number == 4:  # both users wait now, after three answers
            waiting.set()
        return answer() if number < 3 else [(0, chunk()), (0, WAIT)]

    with serving(script) as server:
        command = [
            sys.executable, "-m", "moescope", "bench", "--base-url", server.url, "--model", "m",
            "--endpoint", "completions", "--max-concurrency", "2", "--result", str(result),
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert waiting.wait(60)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    values = orjson.loads(result.read_bytes())
    assert (values["completed"], values["failed"]) == (3, 0)
    assert values["moescope"]["interrupted"] == 2
    assert "requests given up when stopped" in out


def test_the_line_that_is_shown_meanwhile():
    run = Run(
        [(Turn("a", 1),)] * 9, Ask(model="m", endpoint="completions"),
        Target(base_url="http://moe"), Pace(max_concurrency=1),
    )  # fmt: skip
    assert live.status(run, 0.5) == "   0.5 s  0 of 9 requests, 0 in flight, 0 failed"
    old = Record(due_s=0, sent_s=0, chunk_s=[9.0], e2el_s=9.0, completion_tokens=100)
    new = Record(due_s=0, sent_s=18, chunk_s=[0.5, 1.0], e2el_s=1.0, completion_tokens=11)
    run.records, run.in_flight = [old, new, new], 2
    assert live.status(run, 20.0) == (
        "  20.0 s  3 of 9 requests, 2 in flight, 0 failed; last 5 s: 0.4 requests/s, "
        "4 tokens/s, TTFT 500.0 ms, TPOT 50.00 ms"
    )


def test_numbers_are_shown_in_place_on_a_terminal():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    with serving(lambda number, body: answer(3, 0.01)) as server:
        session.run(
            [(Turn("a", 3),)] * 4, Ask(model="m", endpoint="completions"),
            Target(base_url=server.url), Pace(max_concurrency=2), console=console,
        )  # fmt: skip
    assert "of 4 requests" in shown.getvalue()


def test_a_model_must_be_listed_where_none_is_named():
    with serving(lambda number, body: answer()) as server, pytest.raises(ServerError, match="404"):
        session.served_model(Target(base_url=server.url))


def test_a_malformed_address_is_told(capsys):
    assert run("bench", "--model", "m", "--base-url", "http://moe:x", "--max-concurrency", "1") == 1
    assert "cannot reach http://moe:x" in capsys.readouterr().err

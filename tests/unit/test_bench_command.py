"""``moescope bench`` as a command."""

import io
import re
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
from moescope.bench.measured_request import MeasuredRequest
from moescope.bench.workload import RequestOptions, Turn


def bench(url, *argv):
    return run("bench", "--base-url", url, "--model", "m", "--endpoint", "completions", *argv)


def test_a_run_writes_its_files_and_shows_its_figures(tmp_path, capsys):
    result, plot = tmp_path / "r.json", tmp_path / "r.png"
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
    assert re.search(rf"model +m *\n *server +{server.url} *\n *load +6 conversations of", out)
    assert "requests completed" in out
    assert str(result) in out
    assert not any("seed" in seen.body for seen in server.seen)


def test_a_seed_that_is_given_is_sent():
    with serving(lambda number, body: answer()) as server:
        assert bench(server.url, "--num-prompts", 1, "--temperature", 1, "--seed", 7) == 0
    assert server.seen[0].body["seed"] == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--plot", "r.xyz"), "invalid --plot 'r.xyz': expected a file named"),
        (("--plot", "missing/r.png"), "cannot write missing/r.png: there is no directory"),
        (("--plot", "file/r.png"), "cannot write file/r.png"),
        (("--result", "missing/r.json"), "cannot write missing/r.json: there is no directory"),
        (("--result", "file/r.json"), "cannot write file/r.json"),
        (("--result", "."), "cannot write .: it is a directory"),
        (("--result", "r.png", "--plot", "./r.png"), "--result is the same file"),
        (("--dataset-name", "foo"), "'foo': expected gsm8k, prose, sample or random"),
        (("--dataset-name", "gsm8k", "--file", "missing.jsonl"), "cannot read missing.jsonl"),
        (("--dataset-name", "random", "--file", "file"), "invalid --file 'file'"),
        (("--dataset-name", "random", "--endpoint", "chat"), "invalid --endpoint 'chat'"),
        (("--dataset-name", "random", "--token-range", 9, 3), "invalid --token-range"),
        (("--endpoint", "embeddings"), "invalid --endpoint"),
        (("--extra-body", "[]"), "invalid --extra-body"),
        (("--request-rate", 0), "invalid request rate"),
        (("--burstiness", 0), "invalid --burstiness"),
        (("--ramp-up-strategy", "linear"), "invalid ramp-up"),
        (("--goodput", "ttft"), "invalid --goodput"),
        (("--percentile-metrics", "x"), "invalid --percentile-metrics"),
        (("--metric-percentiles", "x"), "invalid --metric-percentiles"),
        (("--model", "wrong"), "invalid --model 'wrong': {url}/v1/models lists demo, m"),
    ],
)
def test_whatever_is_given_is_checked_before_the_first_request(
    argv, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with serving(lambda number, body: answer()) as server:
        server.pages["/v1/models"] = b'{"data": [{"id": "demo"}, {"id": "m"}]}'
        assert bench(server.url, "--num-warmups", 1, *argv) == 1
    assert server.seen == []
    assert server.connections == (argv[0] == "--model")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message.format(url=server.url) in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_that_is_listed_is_asked_for():
    with serving(lambda number, body: answer()) as server:
        server.pages["/v1/models"] = b'{"data": [{"id": "demo"}, {"id": "m"}]}'
        assert bench(server.url, "--num-prompts", 1) == 0
    assert server.seen[0].body["model"] == "m"


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


@pytest.mark.parametrize("flag", ["--limit", "--num-prompts"])
def test_as_many_are_measured_as_were_asked_for(flag):
    with serving(lambda number, body: answer()) as server:
        assert bench(server.url, flag, 2, "--num-warmups", 1) == 0
    assert len(server.seen) == 3


def test_not_one_answer_is_status_1(capsys):
    with serving(lambda number, body: [429, b'{"error": {"message": "slow down"}}']) as server:
        assert bench(server.url, "--num-prompts", 2, "--max-concurrency", 1) == 1
    out, err = capsys.readouterr()
    assert "http_429: 2" in out
    assert "TTFT" not in out  # there are none, rather than of 0 ms
    assert err == "moescope: no request succeeded: HTTP 429: slow down\n"


def test_a_failed_warm_up_ends_it(capsys):
    with serving(lambda number, body: [500, b"oops"]) as server:
        assert bench(server.url, "--num-prompts", 2, "--num-warmups", 1) == 1
    assert "1 of 1 requests of the warm-up failed" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_what_was_measured(tmp_path, number, status):
    result, waiting = tmp_path / "r.json", threading.Event()

    def script(number, body):
        if number == 4:  # both users wait now, after three answers
            waiting.set()
        return answer() if number < 3 else [(0, chunk()), (0, WAIT)]

    process, out, err = stopped(
        script, waiting, number, "--max-concurrency", "2", "--result", str(result)
    )
    assert process.returncode == status
    values = orjson.loads(result.read_bytes())
    assert (values["completed"], values["failed"]) == (3, 0)
    assert values["moescope"]["interrupted"] == 2
    assert "requests given up when stopped" in out
    assert err == "moescope: stopped: 3 of 100 requests had ended, and the figures are theirs\n"


def test_a_signal_in_the_warm_up_ends_it_with_nothing(tmp_path):
    result, waiting = tmp_path / "r.json", threading.Event()

    def script(number, body):
        waiting.set()
        return [(0, WAIT)]

    process, out, err = stopped(
        script, waiting, signal.SIGINT, "--num-warmups", "1", "--result", str(result)
    )
    assert process.returncode == 130
    assert (out, err) == ("", "moescope: stopped in the warm-up: nothing was measured\n")
    assert not result.exists()


def stopped(script, waiting, number, *argv):
    """Run a load test and send it a signal once an event is set; its process and output."""
    with serving(script) as server:
        command = [
            sys.executable, "-P", "-m", "moescope", "bench", "--base-url", server.url,
            "--model", "m", "--endpoint", "completions", *argv,
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert waiting.wait(60)
                process.send_signal(number)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    return process, out, err


def waiting_run(num):
    return Run(
        [(Turn("a", 1),)] * num, RequestOptions(model="m", endpoint="completions"),
        Target(base_url="http://moe"), Pace(max_concurrency=1),
    )  # fmt: skip


def test_the_line_that_is_shown_meanwhile():
    run = waiting_run(9)
    assert live.status(run, 0.5) == "   0.5 s  0 of 9 requests, 0 failed; 0 in flight"
    old = MeasuredRequest(due_s=0, sent_s=0, chunk_s=[9.0], e2el_s=9.0, completion_tokens=100)
    new = MeasuredRequest(due_s=0, sent_s=18, chunk_s=[0.5, 1.0], e2el_s=1.0, completion_tokens=11)
    run.requests, run.in_flight = [old, new, new], 2
    assert live.status(run, 20.0) == (
        "  20.0 s  3 of 9 requests, 0 failed; last 5 s: TTFT 500.0 ms, TPOT 50.00 ms, 4 tokens/s, "
        "0.4 requests/s; 2 in flight"
    )


def test_the_line_fits_the_terminal():
    run = waiting_run(100_000)
    one = MeasuredRequest(due_s=0, sent_s=990, chunk_s=[9.0, 10.0], e2el_s=9.9, completion_tokens=9)
    run.requests, run.in_flight = [one] * 5_000, 1_024
    assert live.status(run, 1000.0, 80) == (
        "1000.0 s  5000 of 100000 requests, 0 failed; last 5 s: TTFT 9000.0 ms"
    )
    assert live.status(run, 1000.0, 40) == "1000.0 s  5000 of 100000 requests"
    whole = live.status(run, 1000.0)
    for width in range(200):
        line = live.status(run, 1000.0, width)
        assert len(line) <= width
        assert whole.startswith(line)
        assert whole[len(line) : len(line) + 1] in {"", " ", ",", ";"} or not line


@pytest.mark.parametrize("width", [40, 80, 200])
def test_numbers_are_shown_in_place_on_a_terminal(width):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width)
    with serving(lambda number, body: answer(3, 0.3)) as server:
        run, stopped_by = session.run(
            [(Turn("a", 3),)] * 4, RequestOptions(model="m", endpoint="completions"),
            Target(base_url=server.url), Pace(max_concurrency=2), console=console,
        )  # fmt: skip
    assert (len(run.requests), stopped_by) == (4, None)
    lines = [line for line in re.split(r"\x1b\[[0-9?;]*[A-Za-z]|[\r\n]", shown.getvalue()) if line]
    assert any("2 of 4 requests, 0 failed" in line for line in lines)
    assert max(map(len, lines)) <= width
    assert ("TTFT" in shown.getvalue()) == (width > 40)


def test_a_model_must_be_listed_where_none_is_named():
    with serving(lambda number, body: answer()) as server, pytest.raises(ServerError, match="404"):
        session.served_model(Target(base_url=server.url))


def test_a_malformed_address_is_told(capsys):
    assert run("bench", "--model", "m", "--base-url", "http://moe:x", "--max-concurrency", "1") == 1
    assert "cannot reach http://moe:x" in capsys.readouterr().err

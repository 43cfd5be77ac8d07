import itertools
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import orjson
import pytest
from client_fakes import INFO, completion, make_trace

import moescope
from moescope import formats
from moescope import replay as replaying
from moescope.cli import main


def run(*argv) -> int:
    """The exit status of a command line."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as error:
        return error.code or 0


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"moescope {moescope.__version__}\n"


def test_prompts_writes_the_first_25_of_the_sample(tmp_path, capsys):
    out = tmp_path / "prompts.txt"
    assert run("prompts", "sample", "--out", out) == 0
    assert len(out.read_text().splitlines()) == 25
    assert run("prompts", "sample", "--limit", 3, "--out", out) == 0
    assert len(out.read_text().splitlines()) == 3
    assert capsys.readouterr().out.endswith(f"3 prompts: {out}\n")


def test_prompts_reads_gsm8k_from_a_file(tmp_path):
    file, out = tmp_path / "test.jsonl", tmp_path / "prompts.txt"
    file.write_text('{"question": "a\\nb", "answer": "c"}\n')
    assert run("prompts", "--file", file, "--out", out) == 0
    assert out.read_text() == "a\\nb\n"


@pytest.mark.parametrize(
    "argv",
    [
        ("prompts", "mmlu"),
        ("prompts", "sample", "--out", "/nowhere/prompts.txt"),
        ("prompts", "gsm8k", "--file", "/nowhere/test.jsonl"),
        ("plot", "--run-dir", "/nowhere"),
        ("replay", "--run-dir", "/nowhere"),
        ("bench", "--model", "m", "--dataset-name", "mmlu"),
        ("bench", "--model", "m", "--goodput", "ttft"),
        ("bench", "--base-url", "http://127.0.0.1:9"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_status_1(argv, capsys):
    assert run(*argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moescope: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--arm", "stock"), "two arms or more"),
        (("--arm", "stock", "--arm", "nonsense"), "'nonsense' is not an arm"),
        (("--placement", "sideways"), "is no placement"),
    ],
)
def test_overhead_takes_arms(argv, message, capsys):
    assert run("overhead", "--run-dir", "/nowhere", *argv) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [("replay",), ("nonsense",), ("replay", "--run-dir", "x", "--max-tokens", "0")]
)
def test_a_malformed_command_line_is_status_2(argv, capsys):
    assert run(*argv) == 2
    assert "Usage" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("serve",), ("demo", "--run-dir")])
@pytest.mark.parametrize("package", ["moescope_service", "vllm"])
def test_what_needs_vllm_says_what_to_install(argv, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "vllm":
        pytest.importorskip("moescope_service")
    assert run(*argv, *([tmp_path] if argv[0] == "demo" else [])) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"moescope: {package} is not installed: in a clone")
    assert err.count("\n") == 1


def test_serve_passes_everything_on_untouched(tmp_path):
    service = tmp_path / "moescope_service"
    service.mkdir()
    (service / "__init__.py").touch()
    (service / "serve.py").write_text("def main(argv):\n    print(argv)\n    return 7\n")
    (tmp_path / "vllm.py").touch()
    argv = ["--help", "model", "-tp", "2", "--", "--version", "--flag=a b", "-x", "--", ""]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "moescope", "serve", *argv],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"{argv}\n"
    assert done.returncode == 7


@pytest.fixture
def served():
    """A server that answers chats, keeps routes, and refuses the prompt `bad`."""
    traces, numbers = {}, itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            url = httpx.URL(self.path)
            if url.path == "/v1/models":
                self.answer(200, b'{"data": [{"id": "demo"}]}')
            elif url.path == "/moescope/info":
                self.answer(200, orjson.dumps(INFO))
            else:
                trace = traces[url.path.removeprefix("/routes/")]
                self.answer(200, formats.dump_npz([trace]))

        def do_POST(self):
            asked = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = asked["messages"][0]["content"]
            if prompt == "bad":
                self.answer(400, b'{"error": {"message": "refused"}}')
                return
            number = next(numbers)  # several are asked at once
            values = completion(prompt, number)
            traces[values["id"]] = make_trace(number, request_id=values["id"])
            self.answer(200, orjson.dumps(values))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def replay(served, tmp_path, prompts, *more):
    source = tmp_path / "source.txt"
    source.write_text("\n".join(prompts))
    run_dir = tmp_path / "run"
    status = run("replay", "--base-url", served, "--prompts", source, "--run-dir", run_dir, *more)
    return status, run_dir


def test_replay_then_plot_fill_a_run_directory(served, tmp_path):
    status, run_dir = replay(served, tmp_path, ["a", "b", "c"])
    assert status == 0
    assert len((run_dir / "moe_routes.jsonl").read_bytes().splitlines()) == 1 + 3 * 12 * 3
    assert run("plot", "--run-dir", run_dir) == 0
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "expert_hist.png", "expert_layers.png", "moe_routes.jsonl", "prompts.txt",
        "report.md", "responses.jsonl",
    ]  # fmt: skip
    assert "expert_layers.png" in (run_dir / "report.md").read_text()


def test_replay_without_routes(served, tmp_path):
    status, run_dir = replay(served, tmp_path, ["a"], "--no-routes")
    assert status == 0
    assert not (run_dir / "moe_routes.jsonl").exists()


def test_a_failed_request_is_status_1_after_all_the_others_are_done(served, tmp_path, capsys):
    status, run_dir = replay(served, tmp_path, ["bad", "a"])
    assert status == 1
    assert capsys.readouterr().err == (
        "moescope: 1 of 2 requests failed; prompt 1: HTTP 400: refused\n"
    )
    assert len((run_dir / "responses.jsonl").read_bytes().splitlines()) == 2
    assert len((run_dir / "moe_routes.jsonl").read_bytes().splitlines()) == 1 + 12 * 3


def test_the_way_to_this_machine_goes_through_no_proxy(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    status, _ = replay(served, tmp_path, ["a"])
    assert status == 0


def test_a_replay_leaves_nothing_of_the_one_before(served, tmp_path):
    _, run_dir = replay(served, tmp_path, ["a", "b"])
    run("plot", "--run-dir", run_dir)
    replay(served, tmp_path, ["c"], "--no-routes")
    names = sorted(path.name for path in run_dir.iterdir())
    assert names == ["prompts.txt", "report.md", "responses.jsonl"]
    assert "## Routes" not in (run_dir / "report.md").read_text()


def test_what_was_answered_before_an_interruption_is_kept(served, tmp_path, monkeypatch):
    def interrupted(prompt, *args, ask=replaying._body):
        if prompt == "c":
            raise KeyboardInterrupt
        return ask(prompt, *args)

    monkeypatch.setattr(replaying, "_body", interrupted)
    status, run_dir = replay(served, tmp_path, ["a", "b", "c", "d"], "--concurrency", "1")
    assert status == 130
    responses = replaying.read_responses(run_dir / "responses.jsonl")
    assert [one.prompt for one in responses] == ["a", "b"]


def test_overhead_does_not_take_a_captured_server_for_a_stock_one(served, tmp_path, capsys):
    _, run_dir = replay(served, tmp_path, ["a"])
    argv = ("--arm", f"stock={served}", "--arm", f"moescope={served}")
    assert run("overhead", "--run-dir", run_dir, *argv) == 1
    assert "is not vLLM without moescope" in capsys.readouterr().err

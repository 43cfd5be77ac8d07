import contextlib
import os
import signal
import subprocess
import sys

import pytest
import typer
from moe_server import serving as serving_routes
from tls import Authority, serving

import moescope
from moescope.cli import app, main
from tests.waiting import wait_until


def run(*argv) -> int:
    """The exit status of a command line."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as error:
        return error.code or 0


@pytest.mark.parametrize("flag", ["--version", "-v"])
def test_the_version(flag, capsys):
    assert run(flag) == 0
    assert capsys.readouterr().out == f"moescope {moescope.__version__}\n"


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", ["", *sorted(set(COMMANDS) - {"serve"})])
def test_help_has_a_short_name(name, capsys):
    assert run(*filter(None, [name]), "-h") == 0
    assert f"Usage: moescope {name}".strip() in capsys.readouterr().out


WORDS = {
    "--base-url": {"bench", "replay", "routes", "verify"},
    "--api-key": {"bench", "overhead", "replay", "routes", "verify"},
    "--ca-cert": {"bench", "replay", "routes", "verify"},
    "--concurrency": {"bench", "overhead", "replay"},
    "--limit": {"bench", "demo", "prompts", "verify", "view"},
}
"""Options that mean the same everywhere, and the commands that have them."""
ALIASES = {
    ("analyze", "-o"),
    ("bench", "--max-concurrency"),
    ("bench", "--num-prompts"),
    ("convert", "-o"),
    ("diff", "-o"),
    ("verify", "--url"),
    ("view", "-o"),
}


def test_one_word_has_one_meaning():
    named = {
        (name, opt): option
        for name, command in COMMANDS.items()
        for option in command.params
        for opt in option.opts
    }
    for word, commands in WORDS.items():
        assert {name for name, opt in named if opt == word} == commands
        assert {named[name, word].opts[0] for name in commands} == {word}, "it is the main name"
    aliases = {(name, opt) for (name, opt), option in named.items() if opt != option.opts[0]}
    assert aliases - {(name, "-h") for name in COMMANDS} == ALIASES
    for name in WORDS["--base-url"]:
        assert named[name, "--base-url"].default == "http://localhost:8000"


@pytest.mark.parametrize("command", ["bench", "replay"])
def test_an_authority_of_our_own(command, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    (tmp_path / "prompts.txt").write_text("a\n")
    more = ("--run-dir", tmp_path) if command == "replay" else ()
    authority = Authority(tmp_path)
    with serving(authority, "127.0.0.1") as server:
        argv = (command, "--base-url", f"https://localhost:{server.server_port}/v1", *more)
        assert run(*argv) == 1
        assert "certificate verify failed" in capsys.readouterr().err
        assert run(*argv, "--ca-cert", authority.file) == 1
        assert "lists no model" in capsys.readouterr().err, "the server was reached"


def test_prompts_writes_the_first_25_of_the_sample(tmp_path, capsys):
    out = tmp_path / "prompts.txt"
    assert run("prompts", "sample", "--out", out) == 0
    assert len(out.read_text().splitlines()) == 25
    assert run("prompts", "sample", "--limit", 3, "--out", out) == 0
    assert len(out.read_text().splitlines()) == 3
    assert capsys.readouterr().out.endswith(f"3 prompts: {out}\n")


def test_prompts_says_where_there_are_fewer_than_asked_for(tmp_path, capsys):
    out = tmp_path / "prompts.txt"
    assert run("prompts", "sample", "--limit", 200, "--out", out) == 0
    assert capsys.readouterr().out == f"100 prompts, all that sample has: {out}\n"
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n')
    assert run("prompts", "--file", file, "--out", out) == 0
    assert capsys.readouterr().out == f"1 prompts, all that {file} has: {out}\n"


def test_prompts_checks_the_file_that_it_writes_before_it_reads(tmp_path, capsys):
    argv = ("--file", tmp_path / "none.jsonl", "--out", tmp_path / "missing" / "prompts.txt")
    assert run("prompts", *argv) == 1
    assert "there is no directory" in capsys.readouterr().err


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
        (("--arm", "stock"), "expected two or more"),
        (("--arm", "stock", "--arm", "nonsense"), "invalid --arm 'nonsense'"),
        (("--placement", "sideways"), "invalid --placement"),
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
        [sys.executable, "-P", "-m", "moescope", "serve", *argv],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"{argv}\n"
    assert done.returncode == 7


def opened_by_a_reader(fifo):
    with contextlib.suppress(OSError):  # nobody reads yet
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    return None


@pytest.mark.parametrize(
    "argv",
    [
        ("prompts", "--file", "{fifo}"),
        ("replay", "--run-dir", "{run}", "--prompts", "{fifo}"),
        ("plot", "--run-dir", "{run}"),
        ("bench", "--model", "m", "--dataset-name", "gsm8k", "--file", "{fifo}"),
        ("overhead", "--run-dir", "{run}", "--prompts", "{fifo}"),
    ],
)
def test_ctrl_c_is_status_130_and_said_in_a_line(argv, tmp_path):
    fifo = tmp_path / "moe_routes.jsonl"  # what plot reads; it blocks until someone writes
    os.mkfifo(fifo)
    command = [part.format(fifo=fifo, run=tmp_path) for part in argv]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "moescope", *command], stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        try:
            writer = wait_until(lambda: opened_by_a_reader(fifo), "the command reads")
            process.send_signal(signal.SIGINT)
            os.close(writer)  # a signal that came just before it began to read is seen after it
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, b"moescope: stopped by Ctrl-C\n")


def test_overhead_does_not_take_a_captured_server_for_a_stock_one(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    with serving_routes() as server:
        argv = ("--arm", f"stock={server.url}", "--arm", f"moescope={server.url}")
        assert run("overhead", "--run-dir", tmp_path, *argv) == 1
    assert "is not vLLM without moescope" in capsys.readouterr().err

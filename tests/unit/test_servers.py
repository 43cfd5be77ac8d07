import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import moescope
from moescope import CommandError, servers


def start(tmp_path, code, url="http://127.0.0.1:9"):
    return servers.Server(
        "moescope", [sys.executable, "-S", "-c", code], url, tmp_path / "log", os.environ
    )


def test_a_server_that_dies_is_told_with_the_end_of_its_log(tmp_path):
    code = "print('\\n'.join(map(str, range(100)))); print('no such model'); raise SystemExit(3)"
    with (
        pytest.raises(CommandError, match="moescope server ended with status 3") as raised,
        start(tmp_path, code) as server,
    ):
        servers.wait_ready([server], timeout_s=30.0)
    assert str(raised.value).endswith("  99\n  no such model")
    assert "\n  50\n" not in str(raised.value)


def test_a_server_that_is_not_ready_in_time_is_told(tmp_path):
    with (
        pytest.raises(CommandError, match=r"not ready after 0 s; see .*log"),
        start(tmp_path, "import signal; signal.pause()") as server,
    ):
        servers.wait_ready([server], timeout_s=0.0)


def test_a_server_is_ready_when_health_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for this machine
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if len(asked) > 1 else 503)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{listening.server_port}"
        with start(tmp_path, "import signal; signal.pause()", url) as server:
            assert server.is_ready() is False
            servers.wait_ready([server], timeout_s=30.0)
        listening.shutdown()
        thread.join()
    assert asked == ["/health", "/health"]


def test_stopping_ends_the_process_and_its_children(tmp_path):
    # The log is a pipe: it ends when the last process that holds it has ended.
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    code = (
        "import signal, subprocess\n"
        "subprocess.Popen(['sleep', '600'])\n"
        "print('started', flush=True)\n"
        "signal.pause()"
    )
    with os.fdopen(reader, "rb") as pipe:
        with start(tmp_path, code):
            os.set_blocking(reader, True)
            assert pipe.readline() == b"started\n"
        assert pipe.read() == b""


def test_a_server_is_ended_by_its_group_and_shares_processors_with_its_client(tmp_path):
    with start(tmp_path, "import signal; signal.pause()") as server:
        assert os.getpgid(server.pid) == server.pid
        assert os.getsid(server.pid) == os.getsid(0)  # what Linux shares processors by


def test_the_stock_environment_has_nothing_of_moescope():
    env = {
        "PATH": "/bin",
        "MOESCOPE_ENABLE": "1",
        "MOESCOPE_ROUTES_LOG": "x",
        "VLLM_LOG_MOE": "x",
        "VLLM_LOG_MOE_LAYER": "0",
        "VLLM_PLUGINS": "other,moescope",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    assert servers.stock_env(env) == {
        "PATH": "/bin",
        "VLLM_PLUGINS": "other",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    # An empty list still switches the plugins off that it does not name.
    assert servers.stock_env({"VLLM_PLUGINS": "moescope"}) == {"VLLM_PLUGINS": ""}


def test_vllm_does_not_load_the_plugin_on_a_stock_server(tmp_path):
    for name, group in (("mine", "general"), ("tpu", "platform"), ("page", "endpoint")):
        info = tmp_path / f"{name}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[vllm.{group}_plugins]\n{name} = x:y\n")
    env = {"PYTHONPATH": str(tmp_path)}
    # Where no list is given vLLM loads all that it finds, other than endpoints.
    assert {"moescope", "mine", "tpu"} <= set(servers.found_plugins(env))
    stock = servers.stock_env(env)["VLLM_PLUGINS"].split(",")
    assert {"mine", "tpu"} <= set(stock)
    assert {"moescope", "page"}.isdisjoint(stock)


def test_the_plugin_is_loaded_where_it_is_installed():
    env = {"MOESCOPE_ENABLE": "1", "PATH": "/bin"}
    assert servers.installed_env(env) == {"PATH": "/bin"}  # vLLM loads all that it finds
    for given, wanted in (("a", "a,moescope"), ("", "moescope"), ("moescope,a", "moescope,a")):
        assert servers.installed_env({"VLLM_PLUGINS": given}) == {"VLLM_PLUGINS": wanted}


def test_the_commands():
    assert servers.captured_command(["m", "--x"])[1:] == [
        "-P", "-m", "moescope", "serve", "m", "--x",
    ]  # fmt: skip
    assert servers.stock_command(["--x"])[1:] == [
        "-P", "-m", "vllm.entrypoints.launchers.api_server.entry", "--x",
    ]  # fmt: skip


def test_a_server_imports_what_is_installed_whatever_lies_in_the_working_directory(tmp_path):
    for name in ("moescope", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    started = servers.captured_command(["--help"])[:-2]  # without `serve --help`, which wants vLLM
    done = subprocess.run(
        [*started, "--version"],
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"moescope {moescope.__version__}\n"


def test_a_second_interruption_while_a_server_ends_leaves_nothing_behind(tmp_path, monkeypatch):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"

    def interrupted(self, timeout_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(servers.Server, "wait_exit", interrupted)
    with pytest.raises(KeyboardInterrupt), start(tmp_path, code) as server:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)

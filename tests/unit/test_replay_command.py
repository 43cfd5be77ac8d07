"""``moescope replay`` and ``moescope routes``: nothing is lost, whatever happens meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys

import orjson
import pytest
from moe_server import ROWS, serving

from moescope import replay as replaying
from moescope import report, route_files, routes_log
from moescope.cli import main
from moescope.run_dir import RunDir
from tests.waiting import DEADLINE_S, wait_until

LINES = ROWS * 3  # three layers


@pytest.fixture
def server():
    with serving() as one:
        yield one


def run(*argv):
    """The exit status of a command line."""
    try:
        return main([str(part) for part in argv])
    except SystemExit as error:
        return error.code or 0


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def argv_of(server, run_dir, prompts, *more):
    source = run_dir.parent / "source.txt"
    source.write_text("\n".join(prompts))
    where = ("--base-url", server.url, "--run-dir", run_dir)
    return ("replay", *where, "--prompts", source, *more)


def replay(server, run_dir, prompts, *more):
    return run(*argv_of(server, run_dir, prompts, *more))


def fetch_routes(server, run_dir, *more):
    return run("routes", run_dir, "--base-url", server.url, *more)


def responses_of(run_dir):
    return replaying.read_responses(run_dir / "responses.jsonl")


def prompts_of(run_dir):
    return [one.prompt for one in responses_of(run_dir)]


def logged_ids(run_dir):
    """The requests in the log, in its order."""
    lines = (run_dir / "moe_routes.jsonl").read_bytes().splitlines()
    return list(dict.fromkeys(orjson.loads(line)["req_id"] for line in lines[1:]))


def files_of(run_dir):
    """The content of every file of a run."""
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_a_replay_and_a_plot_fill_a_run_directory(server, run_dir):
    assert replay(server, run_dir, ["a", "b", "c"]) == 0
    assert len((run_dir / "moe_routes.jsonl").read_bytes().splitlines()) == 1 + 3 * LINES
    assert server.headers["x-moescope"] == "on"
    assert run("plot", "--run-dir", run_dir) == 0
    assert sorted(files_of(run_dir)) == [
        "expert_hist.png", "expert_layers.png", "moe_routes.jsonl", "prompts.txt",
        "report.md", "responses.jsonl",
    ]  # fmt: skip
    assert "expert_layers.png" in (run_dir / "report.md").read_text()


@pytest.mark.parametrize("form", ["npz", "arrow", "parquet"])
class TestFormats:
    """``--format``: what the routes of a run are stored as."""

    def ids_in(self, run_dir):
        path = RunDir(run_dir).routes
        return [kept.trace.request_id for kept in route_files.read(path)[1]]

    def test_a_run_and_what_reads_it(self, server, run_dir, form):
        assert replay(server, run_dir, ["a", "b", "c"], "--format", form) == 0
        assert RunDir(run_dir).routes.name == f"moe_routes.{form}"
        assert not (run_dir / "moe_routes.jsonl").exists()
        assert self.ids_in(run_dir) == [one.request_id for one in responses_of(run_dir)]
        assert run("plot", "--run-dir", run_dir) == 0
        assert "3 sequences" in (run_dir / "report.md").read_text()
        assert "on cpu, seed" in (run_dir / "report.md").read_text()
        assert run("analyze", run_dir, "-o", run_dir / "analysis") == 0
        assert run("convert", run_dir, "-o", run_dir / "log.jsonl") == 0
        logged = routes_log.read(run_dir / "log.jsonl")
        counted = route_files.counted(RunDir(run_dir).routes)
        assert (logged.counts == counted.counts).all()
        assert (logged.meta, logged.rows) == (counted.meta, counted.rows)

    def test_resume_goes_on_in_the_same_format(self, server, run_dir, form, capsys):
        assert replay(server, run_dir, ["a", "b"], "--format", form) == 0
        before = self.ids_in(run_dir)
        assert replay(server, run_dir, ["a", "b", "c"], "--resume") == 0
        assert self.ids_in(run_dir)[:2] == before
        assert len(self.ids_in(run_dir)) == 3
        files = files_of(run_dir)
        assert replay(server, run_dir, ["a", "b", "c", "d"], "--resume", "--format", "jsonl") == 1
        assert "continued in their own format" in capsys.readouterr().err
        assert files_of(run_dir) == files

    def test_routes_that_are_lacking_are_fetched_into_it(self, server, run_dir, form):
        assert replay(server, run_dir, ["a", "b"], "--format", form) == 0
        ids = self.ids_in(run_dir)
        path = RunDir(run_dir).routes
        with route_files.Spool(run_dir) as spool:
            first = next(route_files.read(path)[1])
            spool.add(first)
            route_files.write(path, spool.stored())
        assert self.ids_in(run_dir) == ids[:1]
        assert fetch_routes(server, run_dir) == 0
        assert self.ids_in(run_dir) == ids

    def test_force_replaces_routes_of_another_format(self, server, run_dir, form):
        assert replay(server, run_dir, ["a"], "--format", form) == 0
        assert replay(server, run_dir, ["a"], "--force") == 0
        assert RunDir(run_dir).routes.name == "moe_routes.jsonl"
        assert not (run_dir / f"moe_routes.{form}").exists()

    def test_other_layers_are_refused(self, server, run_dir, form, capsys):
        assert replay(server, run_dir, ["a"], "--format", form) == 0
        assert replay(server, run_dir, ["a", "b"], "--resume", "--layers", "0") == 1
        assert "is of layers" in capsys.readouterr().err
        assert len(self.ids_in(run_dir)) == 1


def test_a_format_that_is_none_is_refused_before_the_first_prompt(server, run_dir, capsys):
    assert replay(server, run_dir, ["a"], "--format", "csv") == 1
    assert "invalid format 'csv'" in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_replay_without_routes(server, run_dir):
    server.info = None
    assert replay(server, run_dir, ["a"], "--no-routes") == 0
    assert not (run_dir / "moe_routes.jsonl").exists()
    assert "x-moescope" not in server.headers


def test_a_failed_request_is_status_1_after_all_the_others_are_done(server, run_dir, capsys):
    assert replay(server, run_dir, ["bad", "a"]) == 1
    assert capsys.readouterr().err == (
        "moescope: 1 of 2 requests failed; prompt 1: HTTP 400: refused\n"
    )
    assert prompts_of(run_dir) == ["bad", "a"]
    assert len(logged_ids(run_dir)) == 1


def test_the_way_to_this_machine_goes_through_no_proxy(server, run_dir, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert replay(server, run_dir, ["a"]) == 0


class TestBeforeTheFirstRequest:
    @pytest.fixture
    def finished(self, server, run_dir):
        """The files of a finished run, which stay."""
        assert replay(server, run_dir, ["a", "b"]) == 0
        for name in ("expert_hist.png", "expert_layers.png"):
            (run_dir / name).touch()
        report.write(RunDir(run_dir))
        del server.asked[:]
        return files_of(run_dir)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--layers", "99"), "layer 99 is not captured; captured layers: 0, 1, 3"),
            (("--layers", "0-"), "invalid --layers '0-': expected layer numbers"),
            (("--model", "wrong"), "invalid --model 'wrong': "),
            (("--base-url", "http://127.0.0.1:9"), "cannot reach http://127.0.0.1:9"),
            (("--prompts", "/nowhere/prompts.txt"), "cannot read /nowhere/prompts.txt"),
        ],
    )
    @pytest.mark.parametrize("force", [("--force",), ()])
    def test_what_cannot_work_is_refused_and_nothing_is_touched(
        self, server, run_dir, finished, capsys, more, message, force
    ):
        if not force:
            run_dir = run_dir.parent / "other"
        assert replay(server, run_dir, ["c"], *force, *more) == 1
        assert message in capsys.readouterr().err
        assert server.asked == []
        assert files_of(run_dir) == finished if force else not run_dir.exists()

    @pytest.mark.parametrize(
        ("info", "message"),
        [
            (None, "is the server started with `moescope serve`? --no-routes replays without"),
            ({"mode": "counts"}, "keeps no routes (--routes-mode counts): --no-routes"),
        ],
    )
    def test_a_server_without_routes(self, server, run_dir, capsys, info, message):
        server.info = info and {**server.info, **info}
        assert replay(server, run_dir, ["a"]) == 1
        assert message in capsys.readouterr().err
        assert server.asked == []

    def test_a_directory_that_cannot_be_made(self, server, run_dir, capsys):
        run_dir.write_text("a file")
        assert replay(server, run_dir, ["a"]) == 1
        assert f"{run_dir} is not a directory" in capsys.readouterr().err
        assert server.asked == []

    def test_a_finished_run_is_kept(self, server, run_dir, finished, capsys):
        assert replay(server, run_dir, ["c"]) == 1
        err = capsys.readouterr().err
        assert "holds the answers to 2 prompts: --resume goes on with them, --force replaces" in err
        assert server.asked == []
        assert files_of(run_dir) == finished

    def test_a_finished_run_is_replaced_by_force_and_nothing_of_it_is_left(
        self, server, run_dir, finished
    ):
        assert replay(server, run_dir, ["c"], "--no-routes", "--force") == 0
        assert sorted(files_of(run_dir)) == ["prompts.txt", "report.md", "responses.jsonl"]
        assert prompts_of(run_dir) == ["c"]
        assert "## Routes" not in (run_dir / "report.md").read_text()

    def test_a_replay_without_any_answer_replaces_nothing(self, server, run_dir, finished, capsys):
        assert replay(server, run_dir, ["bad", "bad"], "--force") == 1
        out, err = capsys.readouterr()
        assert "2 of 2 requests failed" in err
        assert f"no prompt was answered: {run_dir} stays as it was" in out
        assert files_of(run_dir) == finished

    @pytest.mark.parametrize("more", [(), ("--resume",)])
    def test_prompts_of_somebody_are_kept(self, server, run_dir, capsys, more):
        run_dir.mkdir()
        (run_dir / "prompts.txt").write_text("mine\n")
        assert replay(server, run_dir, ["a"], *more) == 1
        assert "holds other prompts: --force" in capsys.readouterr().err
        assert (run_dir / "prompts.txt").read_text() == "mine\n"

    def test_resume_and_force_exclude_each_other(self, server, run_dir, capsys):
        assert replay(server, run_dir, ["a"], "--resume", "--force") == 1
        assert "give one of them" in capsys.readouterr().err


@contextlib.contextmanager
def started(argv):
    """Run the command as a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "moescope", *map(str, argv)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class TestRoutesOfAnswers:
    def test_they_are_fetched_before_the_store_has_to_evict_them(self, run_dir):
        with serving(room=12) as server:
            prompts = [f"p{number}" for number in range(100)]
            assert replay(server, run_dir, prompts, "--concurrency", "2") == 0
            assert len(logged_ids(run_dir)) == 100

    def test_the_log_has_the_order_of_the_prompts(self, server, run_dir):
        server.held.add("p0")
        wanted = [f"p{number}" for number in range(6)]
        with started(argv_of(server, run_dir, wanted)) as process:
            wait_until(lambda: len(server.fetched) == 5, "the others have routes")
            server.go_on.set()
            process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert prompts_of(run_dir) == wanted
        ids = [one.request_id for one in responses_of(run_dir)]
        assert logged_ids(run_dir) == ids
        assert ids[0] == "chatcmpl-5"  # answered last

    def test_some_layers(self, server, run_dir):
        assert replay(server, run_dir, ["a"], "--layers", "3,0") == 0
        assert routes_log.read(run_dir / "moe_routes.jsonl").layers == [3, 0]

    def test_those_that_are_gone_are_told_and_the_others_are_written(self, server, run_dir, capsys):
        assert replay(server, run_dir, ["a", "b"], "--no-routes") == 0
        del server.traces["chatcmpl-0"]
        assert fetch_routes(server, run_dir) == 1
        err = capsys.readouterr().err
        assert "no routes for 1 of 2 requests; chatcmpl-0: the trace of chatcmpl-0 made room" in err
        assert logged_ids(run_dir) == ["chatcmpl-1"]
        assert "## Routes" in (run_dir / "report.md").read_text()

    def test_only_those_that_are_missing_are_fetched_later(self, server, run_dir):
        assert replay(server, run_dir, ["a", "b", "c"], "--concurrency", "1") == 0
        whole = (run_dir / "moe_routes.jsonl").read_bytes()
        lines = whole.splitlines(keepends=True)
        (run_dir / "moe_routes.jsonl").write_bytes(
            b"".join(line for line in lines if b"chatcmpl-1" not in line)
        )
        (run_dir / "expert_hist.png").touch()
        del server.fetched[:]
        assert fetch_routes(server, run_dir) == 0
        assert server.fetched == ["chatcmpl-1"]
        assert (run_dir / "moe_routes.jsonl").read_bytes() == whole
        assert not (run_dir / "expert_hist.png").exists()  # it lacked a request

    def test_layers_of_the_log_are_those_that_are_fetched_later(self, server, run_dir, capsys):
        assert replay(server, run_dir, ["a"], "--layers", "3") == 0
        before = files_of(run_dir)
        assert fetch_routes(server, run_dir, "--layers", "0") == 1
        assert "moe_routes.jsonl is of layers 3, not 0" in capsys.readouterr().err
        assert files_of(run_dir) == before
        assert replay(server, run_dir, ["a", "b"], "--resume") == 0
        assert routes_log.read(run_dir / "moe_routes.jsonl").layers == [3]

    def test_a_log_of_another_number_of_experts(self, server, run_dir, capsys):
        assert replay(server, run_dir, ["a"]) == 0
        server.info["num_experts"] = 64
        assert fetch_routes(server, run_dir) == 1
        assert "num_experts is 60 in the meta line, not 64" in capsys.readouterr().err

    def test_a_run_without_answers(self, server, run_dir, capsys):
        assert fetch_routes(server, run_dir) == 1
        assert "responses.jsonl" in capsys.readouterr().err
        assert not run_dir.exists()


class TestResume:
    def test_only_prompts_without_an_answer_are_sent(self, server, run_dir):
        assert replay(server, run_dir, ["a", "bad", "c"], "--concurrency", "1") == 1
        before, routes = responses_of(run_dir), logged_ids(run_dir)
        del server.asked[:], server.fetched[:]
        prompts = ["a", "bad", "c", "d"]
        assert replay(server, run_dir, prompts, "--resume") == 1
        assert sorted(server.asked) == ["bad", "d"]
        assert server.fetched == ["chatcmpl-2"]
        after = responses_of(run_dir)
        assert [one.prompt for one in after] == prompts
        assert (after[0], after[2]) == (before[0], before[2])
        assert after[3].started_s >= max(one.end_s for one in before)
        assert logged_ids(run_dir) == [*routes, "chatcmpl-2"]
        assert (run_dir / "prompts.txt").read_text().split() == prompts

    def test_answers_without_routes_get_theirs(self, server, run_dir):
        assert replay(server, run_dir, ["a", "b"], "--no-routes") == 0
        assert replay(server, run_dir, ["a", "b"], "--resume") == 0
        assert len(server.asked) == 2
        assert logged_ids(run_dir) == [one.request_id for one in responses_of(run_dir)]

    def test_nothing_to_go_on_with_is_a_new_run(self, server, run_dir):
        assert replay(server, run_dir, ["a"], "--resume") == 0
        assert prompts_of(run_dir) == ["a"]

    @pytest.mark.parametrize("prompts", [["a", "x"], ["a"]])
    def test_other_prompts_are_refused(self, server, run_dir, capsys, prompts):
        assert replay(server, run_dir, ["a", "b"]) == 0
        before = files_of(run_dir)
        assert replay(server, run_dir, prompts, "--resume") == 1
        assert "answers other prompts, the first of them prompt 2" in capsys.readouterr().err
        assert files_of(run_dir) == before

    def test_another_model_is_refused(self, server, run_dir, capsys):
        assert replay(server, run_dir, ["a"]) == 0
        path = run_dir / "responses.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"demo"', b'"other"'))
        assert replay(server, run_dir, ["a", "b"], "--resume") == 1
        assert "are of the model other, not of demo" in capsys.readouterr().err


class TestStopped:
    PROMPTS = ("a", "b", "c", "d")

    @pytest.mark.parametrize(
        ("number", "status", "name"),
        [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")],
    )
    def test_what_is_answered_is_kept_with_its_routes(self, server, run_dir, number, status, name):
        server.held.add("c")
        argv = argv_of(server, run_dir, self.PROMPTS, "--concurrency", "1")
        with started(argv) as process:
            wait_until(lambda: "c" in server.asked, "c is asked")
            process.send_signal(number)
            _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == status
        assert err == (
            f"moescope: stopped by {name}: 2 of 4 prompts have no answer (`moescope replay "
            f"--resume --run-dir {run_dir}` sends them)\n"
        )
        assert prompts_of(run_dir) == ["a", "b"]
        assert logged_ids(run_dir) == ["chatcmpl-0", "chatcmpl-1"]
        assert "4 prompts, 0 failed, 2 not sent" in (run_dir / "report.md").read_text()
        server.held.clear()
        assert replay(server, run_dir, self.PROMPTS, "--resume") == 0
        assert prompts_of(run_dir) == list(self.PROMPTS)
        assert len(logged_ids(run_dir)) == 4

    def test_routes_that_are_late_are_waited_for_until_a_second_signal(self, server, run_dir):
        server.held.add("c")
        server.holds_routes = True
        argv = argv_of(server, run_dir, self.PROMPTS, "--concurrency", "1")
        with started(argv) as process:
            wait_until(lambda: "c" in server.asked and len(server.fetched) == 2, "c is asked")
            process.send_signal(signal.SIGINT)
            wait_until(lambda: len(server.fetched) == 4, "routes are asked for once more")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert "for at most 30 s; Ctrl-C ends that too" in out
        assert f"2 of 2 answers have no routes (`moescope routes {run_dir}` fetches them)" in err
        assert prompts_of(run_dir) == ["a", "b"]
        server.go_on.set()
        assert fetch_routes(server, run_dir) == 0
        assert logged_ids(run_dir) == ["chatcmpl-0", "chatcmpl-1"]

    def test_a_run_that_was_to_be_replaced_stays_where_nothing_was_answered(self, server, run_dir):
        assert replay(server, run_dir, ["a", "b"]) == 0
        before = files_of(run_dir)
        server.held |= {"c", "d"}
        with started(argv_of(server, run_dir, ["c", "d"], "--force")) as process:
            wait_until(lambda: {"c", "d"} <= {*server.asked}, "both are asked")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert files_of(run_dir) == before

    def test_nothing_is_left_where_nothing_was_answered(self, server, run_dir):
        server.held.add("a")
        with started(argv_of(server, run_dir, ["a"])) as process:
            wait_until(lambda: server.asked, "it is asked")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=DEADLINE_S)
        assert "1 of 1 prompts have no answer" in err
        assert files_of(run_dir) == {}

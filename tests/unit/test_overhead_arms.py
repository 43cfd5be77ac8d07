"""The arms: how they are named, started and checked."""

import sys
from pathlib import Path

import httpx
import pytest
from client_fakes import INFO, server

from moescope import CommandError
from moescope.overhead import arms, hosting
from moescope.overhead.arms import Arm
from moescope.run_dir import RunDir


def test_arms_are_parsed():
    assert Arm.parse("stock") == Arm(name="stock")
    assert Arm.parse("x=http://h:1") == Arm(name="x", url="http://h:1")
    assert Arm.parse("x=serve --port {port} a=b").command == "serve --port {port} a=b"
    for text in ("nonsense", "x=serve", "x="):
        with pytest.raises(CommandError):
            Arm.parse(text)


@pytest.mark.parametrize("texts", [["stock"], ["stock", "stock"]])
def test_two_arms_or_more_of_different_names_are_wanted(texts):
    with pytest.raises(CommandError, match="expected two or more"):
        arms.parse_all(texts)


def test_the_commands_of_the_built_in_arms():
    model = arms.Model(path="/m", served_name="demo", args=["--dtype", "float32"])
    both = ["--served-model-name", "demo", "--host", "127.0.0.1", "--dtype", "float32"]
    stock = [*["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "/m"], *both]
    capture = [*["-m", "moescope", "serve", "/m"], *both]
    expected = {
        "stock": stock,
        "stock-again": stock,
        "moescope": capture,
        "counts": [*capture, "--routes-mode", "counts"],
        "paused": capture,
        "installed": stock,
        "routed-experts": [*stock, "--enable-return-routed-experts"],
    }
    assert set(expected) == set(arms.BUILT_IN)
    for name, command in expected.items():
        line = Arm(name=name).command_line(model, 81)
        assert line == [sys.executable, "-P", *command, "--port", "81"]
    custom = Arm.parse("x=run --port {port} 'a b'")
    assert custom.command_line(model, 81) == ["run", "--port", "81", "a b"]


def test_commands_are_told_as_one_types_them(tmp_path):
    launcher = hosting.Launcher(
        model=arms.Model(path=str(Path.cwd() / "a model"), served_name="demo"),
        run_dir=RunDir(tmp_path),
        timeout_s=1.0,
        tell=print,
    )
    every = [Arm(name="moescope"), Arm(name="x", command="y {port}"), Arm(name="z", url="http://z")]
    assert launcher.commands(every) == {
        "moescope": "python -P -m moescope serve 'a model' --served-model-name demo "
        "--host 127.0.0.1 --port {port}",
        "x": "y {port}",
        "z": "http://z",
    }


def test_a_stock_arms_environment_has_nothing_of_moescope():
    env = {"MOESCOPE_ENABLE": "1", "PATH": "/bin"}
    for name in ("stock", "stock-again", "routed-experts"):
        made = Arm(name=name).environment(env)
        assert "moescope" not in made.pop("VLLM_PLUGINS").split(",")
        assert made == {"PATH": "/bin"}
    assert Arm(name="installed").environment(env) == {"PATH": "/bin"}
    assert Arm(name="moescope").environment(env) == env


def check(name, transport):
    return arms.check(Arm(name=name), "http://moe", None, transport)


def test_arms_are_what_they_must_be():
    plain, captured = server({}), server({"GET /moescope/info": INFO})
    paused = server({"GET /moescope/info": {**INFO, "capture": "paused"}})
    counting = server({"GET /moescope/info": {**INFO, "mode": "counts"}})
    down = httpx.MockTransport(lambda _: httpx.Response(503, json={"detail": "collector"}))
    assert check("stock", plain) is None
    assert check("anything", plain) is None
    assert check("moescope", captured).model == "demo"
    assert check("anything", paused).capture == "paused"
    assert check("counts", counting).mode == "counts"
    assert check("paused", paused).capture == "paused"
    assert check("installed", plain) is None
    for name, transport, why in (
        ("stock", captured, "answers /moescope/info"),
        ("stock-again", paused, "answers /moescope/info"),
        ("routed-experts", captured, "answers /moescope/info"),
        ("moescope", plain, "HTTP 404"),
        ("moescope", paused, "is paused"),
        ("moescope", counting, "--routes-mode is counts, not routes"),
        ("installed", captured, "answers /moescope/info"),
        ("paused", captured, "is on, not paused"),
        ("paused", plain, "HTTP 404"),
        ("counts", captured, "--routes-mode is routes, not counts"),
        ("stock", down, "HTTP 503"),
    ):
        with pytest.raises(CommandError, match=why):
            check(name, transport)


def test_the_arm_paused_is_paused_where_moescope_started_it():
    asked = []

    def pause(request):
        asked.append(request.url.path)
        return httpx.Response(200, json={"capture": "paused"})

    transport = server({"POST /routes/pause": pause})
    for arm in (Arm(name="moescope"), Arm(name="stock"), Arm(name="paused", url="http://moe")):
        arms.prepare(arm, "http://moe", None, transport)
    assert asked == []
    arms.prepare(Arm(name="paused"), "http://moe", None, transport)
    assert asked == ["/routes/pause"]

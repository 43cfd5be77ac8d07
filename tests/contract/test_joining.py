"""The key of several nodes, and what a node that is not the first one does before it loads."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
from argparse import Namespace
from types import SimpleNamespace

import pytest

from moescope_service import plugin, runtime, serve
from moescope_service.capture.ranks import place_of
from moescope_service.errors import RefusedError
from moescope_service.node_key import make_key, read_key
from moescope_service.processes import Process
from moescope_service.runtime import joining
from moescope_service.settings import RUNTIME_DIR, Settings
from moescope_service.vllm_contract.nodes import (
    copy_to_ray,
    is_first_node,
    needs_other_nodes,
)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Those of every node, in the environment too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    monkeypatch.setenv("MOESCOPE_ROUTES_BIND", f"127.0.0.1:{port}")
    monkeypatch.setenv("MOESCOPE_ROUTES_KEY_FILE", str(tmp_path / "key"))
    return Settings.from_env()


@pytest.fixture
def first_node(settings):
    """The first node's collector, which has written the key."""
    runtime.ensure_collector()
    yield settings
    runtime.release().end()


def elsewhere(monkeypatch):
    """What follows runs as on another node: the first one's directory is not there."""
    monkeypatch.delenv(RUNTIME_DIR)


class TestKeyFile:
    def test_it_is_written_once_and_for_its_owner_alone(self, tmp_path):
        path = tmp_path / "key"
        make_key(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        key = read_key(path)
        make_key(path)
        assert read_key(path) == key
        assert list(tmp_path.iterdir()) == [path]
        assert key.secret.decode() not in repr(key)

    def test_each_is_another(self, tmp_path):
        for name in "ab":
            make_key(tmp_path / name)
        assert read_key(tmp_path / "a") != read_key(tmp_path / "b")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
    def test_one_that_others_reach_is_refused(self, mode, tmp_path):
        path = tmp_path / "key"
        make_key(path)
        path.chmod(mode)
        with pytest.raises(RefusedError, match=rf"others .* \(mode {mode:04o}\): chmod 600 {path}"):
            read_key(path)

    @pytest.mark.parametrize("text", [b"", b"x" * 40, b"x" * 39, b"\xff" * 40, b"0" * 100_000])
    def test_one_that_holds_no_key_is_refused(self, text, tmp_path):
        path = tmp_path / "key"
        path.touch(0o600)
        path.write_bytes(text)
        if text == b"x" * 40:
            assert read_key(path).secret == text
            return
        with pytest.raises(RefusedError, match="it holds no key"):
            read_key(path)

    def test_one_that_is_missing_or_a_directory_is_refused(self, tmp_path):
        with pytest.raises(RefusedError, match=r"no such file: the first node writes it"):
            read_key(tmp_path / "key")
        with pytest.raises(RefusedError, match=r"cannot be read: Is a directory"):
            read_key(tmp_path)

    def test_where_none_can_be_written_is_a_refusal(self, tmp_path):
        with pytest.raises(RefusedError, match=r"--routes-key-file: cannot write .*/missing/key"):
            make_key(tmp_path / "missing" / "key")


def test_the_first_node_s_processes_reach_their_own_socket(first_node):
    assert runtime.link_address().url == f"ipc://{os.environ[RUNTIME_DIR]}/collector.sock"
    runtime.join_if_elsewhere()


@pytest.mark.parametrize("has_variable", [False, True])
def test_another_node_joins(has_variable, first_node, tmp_path, monkeypatch):
    """Also where Ray handed on the first node's variables: its directory is another machine's."""
    own = os.environ[RUNTIME_DIR]
    with monkeypatch.context() as patch:
        elsewhere(patch)
        if has_variable:
            patch.setenv(RUNTIME_DIR, str(tmp_path))
            stranger = dataclasses.replace(Process.current(), world="another/1")
            (tmp_path / "maker").write_text(str(stranger))
        assert runtime.link_address().url == f"tcp://{first_node.bind}"
        runtime.join_if_elsewhere()
    assert os.environ[RUNTIME_DIR] == own


def test_all_nodes_hash_api_keys_alike(first_node, monkeypatch):
    salt = runtime.owner_salt()
    elsewhere_salt = read_key(first_node.key_file).owner_salt
    assert (salt, len(salt)) == (elsewhere_salt, 32)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mode", "counts", "the first node has --routes-mode routes, this one has counts"),
        ("weights_dtype", "float32", "has --routes-weights-dtype float16, this one has float32"),
    ],
)
def test_another_setting_is_refused(name, value, words, first_node):
    with pytest.raises(RefusedError, match=words):
        runtime.join(dataclasses.replace(first_node, **{name: value}))


def test_another_version_is_refused(first_node, monkeypatch):
    monkeypatch.setattr("moescope.__version__", "9.9")
    with pytest.raises(RefusedError, match=r"the first node has moescope .*, this one has 9\.9"):
        runtime.join(first_node)


def test_another_key_is_refused(first_node, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "BROKEN_TIMEOUT_S", 0.5)
    make_key(tmp_path / "other")
    with pytest.raises(RefusedError, match=r"ends every connection: this node's --routes-key-file"):
        runtime.join(dataclasses.replace(first_node, key_file=tmp_path / "other"))


def test_nobody_there_is_a_refusal_in_time(settings):
    make_key(settings.key_file)
    with pytest.raises(RefusedError, match=r"did not answer within 0\.2 s: start the first node"):
        runtime.join(settings, timeout_s=0.2)


def test_no_key_is_a_refusal(settings):
    with pytest.raises(RefusedError, match="there is no such file: the first node writes it"):
        runtime.join(settings)


def test_a_host_without_an_address_is_a_refusal(settings):
    make_key(settings.key_file)
    bind = settings.bind._replace(host="no-such-host.invalid")
    with pytest.raises(RefusedError, match=r"--routes-bind no-such-host\.invalid:\d+: "):
        runtime.join(dataclasses.replace(settings, bind=bind))


def test_a_port_in_use_is_a_refusal(settings, capfd):
    with (
        socket.create_server((settings.bind.host, settings.bind.port)),
        pytest.raises(RefusedError, match="the collector process did not start"),
    ):
        runtime.ensure_collector()
    words = f"--routes-bind {settings.bind}: Address already in use"
    assert words in capfd.readouterr().err


def make_parallel(**changes):
    values = {
        "nnodes": 1, "node_rank": 0, "data_parallel_rank": 0, "data_parallel_size": 1,
        "data_parallel_size_local": 1, "data_parallel_external_lb": False,
        "data_parallel_hybrid_lb": False, "distributed_executor_backend": "mp",
        "data_parallel_backend": "mp",
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


def test_a_script_on_another_node_is_refused(settings):
    other = make_parallel(nnodes=2, node_rank=1)
    with pytest.raises(RefusedError, match=r"vllm\.LLM is recorded on the first node alone: start"):
        plugin._find_collector(other, settings)


def test_a_headless_server_is_refused_without_an_address(settings):
    args = Namespace(grpc=False, headless=True)
    serve._check_front_end(args, settings)
    with pytest.raises(RefusedError, match=r"^--headless: this node has no collector: name the"):
        serve._check_front_end(args, Settings())


LATER = {"data_parallel_rank": 1, "data_parallel_size": 2}


@pytest.mark.parametrize(
    ("parallel", "headless", "is_first"),
    [
        ({}, False, True),
        ({"nnodes": 2}, False, True),
        ({"nnodes": 2, "node_rank": 1}, True, False),
        ({"data_parallel_size": 2}, False, True),
        (LATER, True, False),
        (LATER | {"data_parallel_external_lb": True}, False, False),
        (LATER | {"data_parallel_hybrid_lb": True}, False, False),
        ({"data_parallel_size": 2, "data_parallel_size_local": 2}, True, False),
    ],
)
def test_which_node_has_the_collector(parallel, headless, is_first):
    """In the last case the first node has the API servers alone, and no engine."""
    assert is_first_node(make_parallel(**parallel), headless=headless) is is_first


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({}, None),
        ({"nnodes": 2}, "--nnodes is 2"),
        ({"data_parallel_size": 2}, "--data-parallel-size-local is 1 of 2"),
        ({"data_parallel_size": 2, "data_parallel_external_lb": True}, None),
        ({"data_parallel_size": 2, "data_parallel_hybrid_lb": True}, None),
        ({"distributed_executor_backend": "ray"}, "Ray starts the workers"),
        ({"data_parallel_backend": "ray"}, "Ray starts the workers"),
    ],
)
def test_which_engines_have_workers_elsewhere(parallel, words):
    assert needs_other_nodes(make_parallel(**parallel)) == words


@pytest.mark.parametrize(("all_nodes", "engine", "num_engines"), [(False, 1, 2), (True, 3, 4)])
def test_which_engines_share_a_collector(all_nodes, engine, num_engines, monkeypatch):
    """The second one of the second node, each with two."""
    for name in ("get_tp_group", "get_pp_group"):
        group = SimpleNamespace(rank_in_group=0, world_size=1)
        monkeypatch.setattr(f"vllm.distributed.parallel_state.{name}", lambda group=group: group)
    parallel = make_parallel(
        data_parallel_size=4, data_parallel_size_local=2, data_parallel_rank=3,
        data_parallel_index=3, use_sequence_parallel_moe=False,
    )  # fmt: skip
    worker = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    place = place_of(worker, all_nodes=all_nodes)
    assert (place.engine, place.num_engines) == (engine, num_engines)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("", "MOESCOPE_ENABLE,MOESCOPE_ROUTES_"),
        ("A_, B_", "A_,B_,MOESCOPE_ENABLE,MOESCOPE_ROUTES_"),
        ("MOESCOPE_ROUTES_,A_", "MOESCOPE_ROUTES_,A_,MOESCOPE_ENABLE"),
    ],
)
def test_what_ray_carries_to_its_workers(given, want, monkeypatch):
    """By vLLM's own choice of variables: all of ours but the directory of this node."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    env = {name: given} if given else {}
    copy_to_ray(env)
    assert env == {name: want}
    ours = {"MOESCOPE_ENABLE", "MOESCOPE_ROUTES_BIND", "MOESCOPE_ROUTES_KEY_FILE"}
    for variable in (*ours, RUNTIME_DIR):
        monkeypatch.setenv(variable, "x")
    monkeypatch.setenv(name, want)
    copied = {one for one in get_env_vars_to_copy() if one.startswith("MOESCOPE_")}
    assert copied >= ours
    assert RUNTIME_DIR not in copied

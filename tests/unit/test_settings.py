"""Flags and variables are one."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from moescope_service import settings
from moescope_service.settings import (
    Settings,
    export,
    flag,
    is_enabled,
    variable,
)

NAMES = [field.metadata["name"] for field in dataclasses.fields(Settings)]


def test_defaults():
    assert Settings.from_env({}) == Settings()
    found = Settings()
    assert (found.memory_bytes, found.queue_bytes) == (2**30, 64 * 2**20)
    assert (found.weights_dtype, found.kept_share, found.keeps_token_ids) == ("float16", 1.0, True)
    assert (found.log, found.log_layers, found.allows_untested_vllm) == (None, None, False)


def test_variables_are_read_and_empty_ones_are_not():
    found = Settings.from_env(
        {
            "MOESCOPE_ROUTES_MEMORY": "1MiB",
            "MOESCOPE_ROUTES_DEFAULT": "off",
            "MOESCOPE_ROUTES_QUEUE": "",
        }
    )
    assert (found.memory_bytes, found.keeps_by_default) == (2**20, False)
    assert found.queue_bytes == 64 * 2**20


def test_the_variables_of_the_older_log_name_the_log_and_ours_win():
    older = {"VLLM_LOG_MOE": "a.jsonl", "VLLM_LOG_MOE_LAYER": "0,5"}
    found = Settings.from_env(older)
    assert (found.log, found.log_layers) == (Path("a.jsonl"), (0, 5))
    found = Settings.from_env({**older, "MOESCOPE_ROUTES_LOG": "b.jsonl"})
    assert (found.log, found.log_layers) == (Path("b.jsonl"), (0, 5))


@pytest.mark.parametrize(
    ("name", "value"),
    [("MEMORY", "lots"), ("WEIGHTS_DTYPE", "bfloat16"), ("DEFAULT", "yes"), ("LOG_LAYERS", "x")],
)
def test_an_error_names_the_variable_and_the_value(name, value):
    with pytest.raises(ValueError, match=f"MOESCOPE_ROUTES_{name}") as caught:
        Settings.from_env({f"MOESCOPE_ROUTES_{name}": value})
    assert value in str(caught.value)


@pytest.mark.parametrize("name", ["MEMORY", "QUEUE", "PREFIX_MEMORY"])
def test_no_more_memory_than_there_is(name):
    variable_name, most = f"MOESCOPE_ROUTES_{name}", settings.memory_bytes()
    assert Settings.from_env({variable_name: f"{most}"})
    with pytest.raises(ValueError, match=f"^invalid {variable_name} '{most + 1}': expected at mo"):
        Settings.from_env({variable_name: f"{most + 1}"})
    env: dict[str, str] = {}
    option = f"--routes-{name.lower().replace('_', '-')}"
    flags = parse(option, f"{most + 1}")
    with pytest.raises(ValueError, match=rf"^invalid {option} .* machine's memory"):
        export(flags, env)
    assert env == {}


@pytest.mark.parametrize("given", ["MOESCOPE_ROUTES_BIND", "MOESCOPE_ROUTES_KEY_FILE"])
def test_an_address_and_a_key_go_together(given):
    env = {"MOESCOPE_ROUTES_BIND": "head:5570", "MOESCOPE_ROUTES_KEY_FILE": "key"}
    found = Settings.from_env(env)
    assert (str(found.bind), found.key_file) == ("head:5570", Path("key"))
    with pytest.raises(ValueError, match=r"BIND \(--routes-bind\) and .* go together: give both"):
        Settings.from_env({given: env[given]})


def test_a_log_may_be_larger_than_the_memory():
    size = 2 * settings.memory_bytes()
    found = Settings.from_env({"MOESCOPE_ROUTES_LOG_MAX_BYTES": f"{size}"})
    assert found.log_max_bytes == size


def test_an_error_names_the_older_variable_where_that_was_given():
    with pytest.raises(ValueError, match=r"^invalid VLLM_LOG_MOE_LAYER 'x': expected"):
        Settings.from_env({"VLLM_LOG_MOE_LAYER": "x"})


def parse(*argv: str) -> argparse.Namespace:
    # vLLM's help tells the defaults that it knows in this way too.
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    settings.add_arguments(parser)
    return parser.parse_args(argv)


def test_every_setting_has_a_flag_a_variable_and_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        assert flag(name) in text
        assert f"[{variable(name)}]" in text
    assert text.count("(default: ") == len(NAMES)


def test_flags_are_written_to_the_environment():
    env = {"MOESCOPE_ROUTES_QUEUE": "1MiB", "MOESCOPE_ROUTES_MEMORY": "1GiB"}
    found = export(parse("--routes-memory", "2GiB", "--routes-log-layers", "1-2"), env)
    assert env["MOESCOPE_ROUTES_MEMORY"] == "2GiB"
    assert env["MOESCOPE_ROUTES_LOG_LAYERS"] == "1-2"
    assert "MOESCOPE_ROUTES_DEFAULT" not in env
    assert (found.memory_bytes, found.queue_bytes, found.log_layers) == (2**31, 2**20, (1, 2))
    assert found == Settings.from_env(env)


def test_an_error_names_the_flag_and_nothing_is_written():
    env: dict[str, str] = {}
    with pytest.raises(ValueError, match=r"^invalid --routes-memory 'lots': expected"):
        export(parse("--routes-memory", "lots"), env)
    assert env == {}


@pytest.mark.parametrize(
    ("env", "enabled"),
    [
        ({}, False),
        ({"MOESCOPE_ENABLE": "0"}, False),
        ({"MOESCOPE_ENABLE": ""}, False),
        ({"MOESCOPE_ENABLE": "1"}, True),
        ({"VLLM_LOG_MOE": "routes.jsonl"}, True),
        ({"VLLM_LOG_MOE": ""}, False),
        ({"MOESCOPE_ENABLE": "0", "VLLM_LOG_MOE": "routes.jsonl"}, False),
    ],
)
def test_enabled(env, enabled):
    assert is_enabled(env) is enabled


@pytest.mark.parametrize(("text", "seconds"), [("60", 60.0), ("0.5", 0.5), ("3600", 3600.0)])
def test_the_window_of_the_metrics(text, seconds):
    assert Settings.from_env({"MOESCOPE_ROUTES_METRICS_WINDOW": text}).metrics_window_s == seconds


@pytest.mark.parametrize("text", ["0", "-1", "3601", "1m", "nan", "inf", ""])
def test_what_is_no_window(text):
    with pytest.raises(ValueError, match=r"_METRICS_WINDOW .*: expected seconds"):
        Settings.from_env({"MOESCOPE_ROUTES_METRICS_WINDOW": text or " "})


@pytest.mark.parametrize(("text", "share"), [("1", 1.0), ("0.1", 0.1), ("0", 0.0), ("1e-3", 0.001)])
def test_the_share_that_is_kept(text, share):
    assert Settings.from_env({"MOESCOPE_ROUTES_SAMPLE": text}).sampled_share == share


@pytest.mark.parametrize("text", ["-0.1", "1.1", "10%", "nan", "inf", " "])
def test_what_is_no_share(text):
    with pytest.raises(ValueError, match=r"^invalid MOESCOPE_ROUTES_SAMPLE .*: expected a share"):
        Settings.from_env({"MOESCOPE_ROUTES_SAMPLE": text})


def test_names_of_hosts():
    found = Settings.from_env(
        {"MOESCOPE_ROUTES_ALLOWED_HOSTS": "moe.example.org, Box.lan.,10.0.0.1"}
    )
    assert found.allowed_hosts == {"moe.example.org", "box.lan", "10.0.0.1"}


@pytest.mark.parametrize("text", ["https://a.b", "a.b:80", "a.b/", "a,,b", "*", "*.a.b", " ", "-a"])
def test_what_is_no_name_of_a_host(text):
    with pytest.raises(
        ValueError, match=r"^invalid MOESCOPE_ROUTES_ALLOWED_HOSTS .*: expected host"
    ):
        Settings.from_env({"MOESCOPE_ROUTES_ALLOWED_HOSTS": text})


def test_the_admin_key_is_shown_nowhere(capsys):
    env = {"MOESCOPE_ROUTES_ADMIN_KEY": "from-the-environment"}
    args = parse("--routes-admin-key", "from-a-flag")
    found = export(args, env)
    assert (found.admin_key, env["MOESCOPE_ROUTES_ADMIN_KEY"]) == ("from-a-flag", "from-a-flag")
    assert "from-a-flag" not in f"{found!r} {args!r}", "vLLM logs the flags that were given"
    with pytest.raises(SystemExit):
        parse("--help")
    assert "from-a-flag" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["two words", "sch\xf6n", "tab\t", " "])
def test_an_admin_key_that_no_header_carries(key):
    for read in (
        lambda: Settings.from_env({"MOESCOPE_ROUTES_ADMIN_KEY": key}),
        lambda: export(parse("--routes-admin-key", key), {}),
    ):
        with pytest.raises(ValueError, match=r"(?i)admin.key: expected visible ASCII") as caught:
            read()
        assert key.strip() == "" or key not in str(caught.value)

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
    parse_layers,
    parse_size,
    variable,
)

NAMES = [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1000", 1000), ("1k", 1000), ("1KiB", 1024), ("512MB", 512 * 10**6),
     ("1GiB", 2**30), (" 1.5 gib ", 3 * 2**29), ("2g", 2 * 10**9), ("7b", 7)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GiB", "-1", "GiB", "1 TiB", "one", "1e9", "0.1"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0,5-7", (0, 5, 6, 7)),
        (" 3 - 4 , 1", (3, 4, 1)),
        ("2,2,1-3", (2, 1, 3)),
        ("5-5", (5,)),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", ",", "a", "1,", "3-1", "-1", "1-", "1--2", "1.5", "10000"])
def test_what_is_no_list_of_layers(text):
    with pytest.raises(ValueError, match="is no list of layers") as caught:
        parse_layers(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-9999,0", "names more than 10,000 layers"),
        (",".join(["0-9998"] * 140), "names more than 10,000 layers"),
        (",".join(map(str, range(400))), "at most 1000 characters, got 1489"),
    ],
)
def test_what_a_list_of_layers_costs_is_bounded(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_layers(text)
    assert len(str(caught.value)) < 1200


def test_every_layer_by_its_number():
    assert parse_layers(",".join(map(str, range(200)))) == tuple(range(200))
    assert len(parse_layers("0-9999")) == 10_000


def test_defaults():
    assert Settings.from_env({}) == Settings()
    found = Settings()
    assert (found.memory, found.queue) == (2**30, 64 * 2**20)
    assert (found.weights_dtype, found.default, found.token_ids) == ("float16", "on", "on")
    assert (found.log, found.log_layers, found.allow_untested_vllm) == (None, None, "off")


def test_variables_are_read_and_empty_ones_are_not():
    found = Settings.from_env(
        {
            "MOESCOPE_ROUTES_MEMORY": "1MiB",
            "MOESCOPE_ROUTES_DEFAULT": "off",
            "MOESCOPE_ROUTES_QUEUE": "",
        }
    )
    assert (found.memory, found.default, found.queue) == (2**20, "off", 64 * 2**20)


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


def test_an_error_names_the_older_variable_where_that_was_given():
    with pytest.raises(ValueError, match=r"^VLLM_LOG_MOE_LAYER: 'x'"):
        Settings.from_env({"VLLM_LOG_MOE_LAYER": "x"})


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
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
    assert (found.memory, found.queue, found.log_layers) == (2**31, 2**20, (1, 2))
    assert found == Settings.from_env(env)


def test_an_error_names_the_flag_and_nothing_is_written():
    env: dict[str, str] = {}
    with pytest.raises(ValueError, match=r"^--routes-memory: 'lots'"):
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
    assert Settings.from_env({"MOESCOPE_ROUTES_METRICS_WINDOW": text}).metrics_window == seconds


@pytest.mark.parametrize("text", ["0", "-1", "3601", "1m", "nan", "inf", ""])
def test_what_is_no_window(text):
    with pytest.raises(ValueError, match=r"^MOESCOPE_ROUTES_METRICS_WINDOW: .* is no window"):
        Settings.from_env({"MOESCOPE_ROUTES_METRICS_WINDOW": text or " "})


@pytest.mark.parametrize(("text", "share"), [("1", 1.0), ("0.1", 0.1), ("0", 0.0), ("1e-3", 0.001)])
def test_the_share_that_is_kept(text, share):
    assert Settings.from_env({"MOESCOPE_ROUTES_SAMPLE": text}).sample == share


@pytest.mark.parametrize("text", ["-0.1", "1.1", "10%", "nan", "inf", " "])
def test_what_is_no_share(text):
    with pytest.raises(ValueError, match=r"^MOESCOPE_ROUTES_SAMPLE: .* is no share"):
        Settings.from_env({"MOESCOPE_ROUTES_SAMPLE": text})

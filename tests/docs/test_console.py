"""The commands of the documents exist: ``moescope`` and vLLM's, with the flags that they name."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import click
import pytest
import typer

from moescope.cli import app

from .blocks import PAGES, Block, Command, blocks, commands, python_of

COMMANDS = [one for path in PAGES for one in commands(path)]
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


# In a process of its own: vLLM's imports warn, and warnings are errors here.
SERVE_FLAGS = """
from vllm.utils.argparse_utils import FlexibleArgumentParser
from moescope_service import settings
from moescope_service.vllm_contract import compat

parser = FlexibleArgumentParser(prog="moescope serve")
settings.add_arguments(parser)
compat.add_serve_arguments(parser)
print("FLAGS", *(flag for action in parser._actions for flag in action.option_strings))
"""


@pytest.fixture(scope="module")
def serve_flags() -> set[str]:
    """Return every flag of ``moescope serve``: vLLM's and ours."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SERVE_FLAGS],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FLAGS ")]
    return set(line.split()[1:])


def words(command: Command) -> list[str]:
    """Return the words of a command without the settings before it, up to a shell's operator."""
    lexer = shlex.shlex(command.one_line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found = list(lexer)
    while found and _ASSIGNMENT.fullmatch(found[0]):
        found.pop(0)
    ends = [number for number, word in enumerate(found) if set(word) <= set("|&;<>()")]
    return found[: ends[0]] if ends else found


def flags(arguments: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)]


def cli() -> dict[str, click.Command]:
    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    return dict(group.commands)


def unknown(arguments: list[str], serve_flags: set[str]) -> list[str]:
    """Return what the arguments after ``moescope`` name and moescope does not have."""
    if not arguments or arguments[0].startswith("-"):
        return [word for word in arguments if word not in {"--help", "--version"}]
    name, *rest = arguments
    if name not in cli():
        return [name]
    if name == "serve":
        return [flag for flag in flags(rest) if flag not in {*serve_flags, "--help"}]
    cut = rest.index("--") if "--" in rest else len(rest)
    own = {text for option in cli()[name].params for text in (*option.opts, *option.secondary_opts)}
    lacking = [flag for flag in flags(rest[:cut]) if flag not in {*own, "--help"}]
    return lacking + [flag for flag in flags(rest[cut + 1 :]) if flag not in serve_flags]


@pytest.mark.parametrize("program", ["moescope", "vllm"])
def test_commands_and_flags_exist(program: str, serve_flags: set[str]) -> None:
    wrong = []
    for one in COMMANDS:
        called, *arguments = words(one) or [""]
        if called == program:
            missing = unknown(arguments, serve_flags)
            wrong += [f"{one.where}: {program} has no {what}" for what in missing]
    assert not wrong, "\n".join(wrong)


def test_what_does_not_exist_is_found(serve_flags: set[str]) -> None:
    for text, missing in {
        "moescope serve MODEL --routes-mode counts --max-model-len 8": [],
        "moescope serve --routes-colour red --max-modell-len 8": [
            "--routes-colour",
            "--max-modell-len",
        ],
        "A=1 moescope bench --result r.json --plot=r.png | tail": [],
        "moescope bench --resulted r.json": ["--resulted"],
        "moescope overhead --rounds 3 -- --enforce-eager": [],
        "moescope overhead -- --enforce-eagerly": ["--enforce-eagerly"],
        "moescope observe": ["observe"],
    }.items():
        command = Command(Block(PAGES[0], 1, "console", ""), 1, text)
        assert unknown(words(command)[1:], serve_flags) == missing, text


def test_the_documents_have_commands() -> None:
    called = {words(one)[0] for one in COMMANDS if words(one)}
    assert {"curl", "moescope"} <= called


def test_blocks_of_python_keep_their_lines() -> None:
    for path in PAGES:
        script, page = python_of(path).split("\n"), path.read_text().split("\n")
        for number, line in enumerate(script):
            assert line in page[number], f"{path.name}:{number + 1}"
        compile("\n".join(script), str(path), "exec")


def test_a_block_that_is_never_closed_is_refused(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "~~~ python no-run\nx = 1\n```\n~~~\n\n  ```console\n  $ one \\\n    two\n  ```\n"
    )
    first, second = blocks(page)
    assert (first.language, first.runs, first.line, first.text) == (
        "python",
        False,
        2,
        "x = 1\n```",
    )
    assert [(one.line, one.one_line) for one in commands(page)] == [(7, "one two")]
    assert second.language == "console"
    page.write_text("```python\n")
    with pytest.raises(ValueError, match="never closed"):
        blocks(page)

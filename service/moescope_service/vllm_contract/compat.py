"""What differs between the supported versions of vLLM: one shim each.

A shim says since or until when vLLM is otherwise, and why it is needed. It looks at the vLLM that
is installed, not at its number, and goes when no version of `versions.SUPPORTED_VLLM` needs it.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from fastapi import FastAPI

from moescope_service.errors import RefusedError
from moescope_service.vllm_contract.guard import check_internals
from moescope_service.vllm_contract.internals import CLI_ENV_SETUP, ROUTING_REPLAY


def cli_env_setup() -> None:
    """Set the environment variables that vLLM's commands set, such as how workers are started.

    Until 0.32 in ``entrypoints/serve/utils/api_utils.py``, since in ``entrypoints/common``.
    """
    CLI_ENV_SETUP.load().cli_env_setup()


def configure_logging(args: argparse.Namespace) -> None:
    """Let vLLM's loggers follow the command line's ``--log-config-file`` and the like.

    Since 0.31; until 0.30 vLLM's logging followed the environment alone.
    """
    from vllm import logger

    configure = getattr(logger, "configure_logging_from_args", None)
    if configure is not None:
        configure(args)


def keep_warnings() -> None:
    """Let moescope's warnings into the log.

    vLLM's app imports a package that lets the root logger pass errors alone
    (``model_hosting_container_standards``); until 0.30 the command line does. Who sets the level of
    the logger ``moescope`` gets that one.
    """
    logger = logging.getLogger("moescope")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``vllm serve`` to a parser.

    vLLM's ``make_arg_parser`` moved in 0.33; the command adds them to whatever parser it is given.
    Source: ``entrypoints/cli/serve.py``, ``ServeSubcommand.subparser_init``.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    command: Any = ServeSubcommand()
    command.subparser_init(_OneParser(parser))


def allowed_origins(args: argparse.Namespace) -> list[str]:
    """Return the origins that whoever started the server lets in.

    Until 0.31 vLLM's default lets in all of them, since then none. A default is nobody's wish: on
    those versions ``*`` names no origin here, be it given or not.

    Args:
        args: With vLLM's ``--allowed-origins``.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = list(args.allowed_origins)
    if "*" in given:
        parser: argparse.ArgumentParser = FlexibleArgumentParser()
        add_serve_arguments(parser)
        if "*" in parser.get_default("allowed_origins"):
            given.remove("*")
    return given


class _OneParser:
    """Stands where argparse's action of subcommands stands, and has one parser for all of them."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add_parser(self, *_: Any, **__: Any) -> argparse.ArgumentParser:
        return self._parser


def replace_route(app: FastAPI, path: str) -> None:
    """Take vLLM's own route out of an app, so that the one that is added next answers.

    Until 0.31 a plugin's route of the same path loses to it, without a word; later vLLM does this.
    """
    app.router.routes[:] = [one for one in app.routes if getattr(one, "path", None) != path]


def is_stopping(app: FastAPI) -> bool:
    """Return whether the app's server is to stop: it waits for every response to end.

    Source: vLLM 0.32.0, ``entrypoints/launchers/launcher.py`` (``serve_http``).
    """
    return getattr(getattr(app.state, "server", None), "should_exit", False)


def offers_routing_replay() -> bool:
    """Whether a kernel that routes inside can be handed a buffer for the ids that it selects.

    Since 0.32; until 0.31 such a kernel has a buffer and a callback of its own, for vLLM's capture
    alone. On a later vLLM that lacks something of `ROUTING_REPLAY` these kernels are refused, too.
    """
    try:
        check_internals(ROUTING_REPLAY)
    except RefusedError:
        return False
    return True

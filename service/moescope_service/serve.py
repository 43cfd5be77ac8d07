"""``moescope serve``: vLLM's own server with moescope switched on.

The command line is vLLM's, with the ``--routes-…`` flags in a group of their own.
Source: vLLM 0.32.0, ``entrypoints/cli/serve.py`` (``ServeSubcommand.cmd``, ``validate``).
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from moescope import servers
from moescope_service import bundled_model, plugin, runtime, settings
from moescope_service.collector.log_file import check_log
from moescope_service.errors import RefusedError
from moescope_service.imports import check_archive, check_imports
from moescope_service.vllm_contract.guard import check_vllm
from moescope_service.vllm_contract.nodes import copy_to_ray

DEMO_MODEL_NAME = "moescope-demo"
_DEMO_KV_CACHE_BYTES = 256 * 2**20

USAGE = "moescope serve [model] [vLLM's flags] [--routes-… flags]"
DESCRIPTION = """vLLM's OpenAI-compatible server, with the routing of every token at
/routes/{request_id}, /experts and /metrics, and a page at /moescope. Takes every flag of `vllm
serve`; without a model it serves the small mixture-of-experts model that comes with moescope."""
EPILOG = """vLLM's flags:
  --help=all             all of them
  --help=ModelConfig     a group of them, such as ParallelConfig, CacheConfig or Frontend
  --help=max-model-len   those with this in their name"""


def main(argv: list[str]) -> int:
    """Serve until told to stop.

    Args:
        argv: The command line after ``moescope serve``.

    Returns:
        The exit code: 0, or 1 after one clear line on standard error.
    """
    if not {"-h", "--help"}.isdisjoint(argv):
        print(_help())
        return 0
    os.environ.pop(settings.RUNTIME_DIR, None)  # another deployment's, if this is its child
    os.environ[settings.ENABLE] = "1"
    os.environ["VLLM_PLUGINS"] = plugin_names(os.environ.get("VLLM_PLUGINS"))
    copy_to_ray(os.environ)
    try:
        check_imports(with_endpoints=True)
        check_vllm(_export_ours(argv))  # before any import from a vLLM that may be another one
        args = parse(argv)
        _serve(args)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            where = args.uds or f"port {args.port}"
            return _fail(f"{where} is in use: stop its server or choose another --port")
        return _fail(_one_line(error))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        return _fail(runtime.reported_reason() or _one_line(error))
    return 0


def plugin_names(given: str | None) -> str:
    """Return ``VLLM_PLUGINS`` with moescope in it.

    The variable switches off every plugin that it does not name. Where it is unset, all that vLLM
    would load by itself are named.
    """
    if given is None:
        names = servers.found_plugins(os.environ)
    else:
        names = [name for name in given.split(",") if name]
    return ",".join(names if "moescope" in names else [*names, "moescope"])


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse vLLM's flags and ours, and export ours to the environment.

    Raises:
        RefusedError: A value is not allowed, values do not go together, or the model's directory is
            missing.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from moescope_service.api.auth import check_private
    from moescope_service.vllm_contract import compat

    compat.cli_env_setup()
    parser = FlexibleArgumentParser(
        prog="moescope serve",
        usage=USAGE,
        description=DESCRIPTION,
    )
    settings.add_arguments(parser)
    compat.add_serve_arguments(parser)
    args = parser.parse_args(argv)
    try:
        exported = settings.export(args)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    check_private(args, exported)
    _check_front_end(args, exported)
    _check_log(exported)
    check_archive(exported.archive)
    _choose_model(args, argv)
    return args


def _help() -> str:
    """Return the help that needs no import of vLLM; ``--help=…`` is answered by its own parser."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    settings.add_arguments(parser)
    return parser.format_help()


def _export_ours(argv: list[str]) -> settings.Settings:
    """Export our flags alone; vLLM's, and what is wrong with them, are left to `parse`.

    As in vLLM's parser they may be written with underscores.

    Raises:
        ValueError: A value is not allowed; the message names the flag.
    """
    parser = argparse.ArgumentParser(prog="moescope serve", add_help=False, allow_abbrev=False)
    settings.add_arguments(parser)
    dashed = [re.sub("^--routes_[^=]*", lambda m: m[0].replace("_", "-"), arg) for arg in argv]
    return settings.export(parser.parse_known_args(dashed)[0])


def _check_log(exported: settings.Settings) -> None:
    if exported.log is not None:
        try:
            check_log(exported.log, exported.log_max_bytes)
        except OSError as error:
            raise RefusedError(
                f"{settings.flag('log')}: cannot write {error.filename}: {error.strerror}"
            ) from None


def _choose_model(args: argparse.Namespace, argv: list[str]) -> None:
    if args.model_tag is None and not any(re.match(r"--(model|config)\b(?!-)", a) for a in argv):
        if len(args.served_model_name or ()) > 1:
            raise RefusedError(
                f"--served-model-name takes all of {' '.join(args.served_model_name)}: put the "
                "model first"
            )
        print(f"moescope: no model given, serving the bundled one as {DEMO_MODEL_NAME}", flush=True)
        args.model_tag = str(bundled_model.path())
        args.served_model_name = args.served_model_name or [DEMO_MODEL_NAME]
        if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            args.kv_cache_memory_bytes = _DEMO_KV_CACHE_BYTES
    model = args.model_tag or args.model
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().exists():
        raise RefusedError(f"there is no model at {model}: give a directory or a hub's name")


def _check_front_end(args: argparse.Namespace, exported: settings.Settings) -> None:
    from vllm import envs

    others = {
        "--grpc": args.grpc,
        "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND,
    }
    for name, is_on in others.items():
        if is_on:
            raise RefusedError(f"this version of moescope does not record with {name}")
    if args.headless and exported.bind is None:
        raise RefusedError(
            "--headless: this node has no collector: name the first node's by "
            f"{settings.flag('bind')} HOST:PORT and {settings.flag('key_file')} FILE"
        )


def _serve(args: argparse.Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from moescope_service.vllm_contract import compat

    compat.configure_logging(args)
    command: Any = ServeSubcommand()
    command.validate(args)
    plugin.register()
    if not args.uds and not args.headless:
        print(f"moescope: once it serves, look at {_page(args)}", flush=True)
    command.cmd(args)


def _page(args: argparse.Namespace) -> str:
    """Return the address of the page."""
    host = args.host or "localhost"
    if host in {"0.0.0.0", "::"}:  # noqa: S104
        host = "localhost"
    if ":" in host:
        host = f"[{host}]"
    scheme = "https" if args.ssl_certfile else "http"
    return f"{scheme}://{host}:{args.port}{args.root_path or ''}/moescope"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> int:
    if os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG":
        traceback.print_exc()
    print(f"moescope: {message}", file=sys.stderr, flush=True)
    return 1

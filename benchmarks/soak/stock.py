"""``python -m benchmarks.soak.stock``: vLLM's own server, several API servers too.

``vllm serve`` does not start with vLLM's CPU wheel, and its launcher has one API server alone.
Source: vLLM 0.30 to 0.33, ``vllm/entrypoints/cli/serve.py`` (``ServeSubcommand``).
"""

from __future__ import annotations

import sys
from typing import Any

from moescope_service.vllm_contract import compat


def main() -> None:
    """Serve as vLLM's command does."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    compat.cli_env_setup()
    parser = FlexibleArgumentParser()
    compat.add_serve_arguments(parser)
    args = parser.parse_args(sys.argv[1:])
    command: Any = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main()

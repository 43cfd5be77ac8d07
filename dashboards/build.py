"""Writes the dashboards' JSON: ``python -m dashboards.build``, or ``make dashboards``."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import experts, overview, serving

GENERATED = Path(__file__).parent / "generated"
BOARDS = {"overview": overview.build, "experts": experts.build, "serving": serving.build}


def render(name: str) -> str:
    """Return a dashboard's JSON, as Grafana imports and provisions it."""
    board = BOARDS[name]().build()
    return json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write all of them."""
    for name in BOARDS:
        path = GENERATED / f"{name}.json"
        path.write_text(render(name))
        print(path.name)


if __name__ == "__main__":
    main()

"""Draws the pictures of the page in docs/assets anew: ``python -m tests.page.pictures``.

The page shows a real vLLM server on the CPU while word problems of the sample are replayed.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from benchmarks.simulation.server import API_KEY
from moescope.servers import Server

from .browser import Page, chromium
from .served import complete, replayed, vllm_server

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
COLORS = 96
"""Of a picture: so it is small, and text is still sharp."""
PROMPT = (
    "Nora has 14 {0} and finds 9 more. She gives 5 to Leo and 2 to Mia, and loses 3 of them. "
    "How many {0} has Nora now?"
)
HEATMAP = "document.querySelector('#heatmap').dataset.total > 0"
TOKENS = "document.querySelectorAll('#request .token').length"
PAIRS = "document.querySelectorAll('#compare .pair').length"
GROUPS = "document.querySelectorAll('#state article').length"


class View(NamedTuple):
    """What is drawn."""

    address: str
    is_there: str
    """An expression that is true once it is seen."""
    width: int
    height: int
    scheme: Literal["light", "dark"]


def views(ids: Sequence[str]) -> dict[str, View]:
    """Return every view, of two requests, by the name of its picture."""
    one, both = ids[0], "/".join(ids)
    lines = "document.querySelectorAll('#{} tbody tr').length >= 8".format
    return {
        "live": View("live", HEATMAP, 960, 400, "light"),
        "expert": View("expert/2/16", lines("expert"), 960, 420, "dark"),
        "requests": View("requests", lines("requests"), 960, 400, "light"),
        "request": View(f"request/{one}", TOKENS, 1040, 580, "light"),
        "agreement": View(f"request/{both}", TOKENS, 1040, 580, "dark"),
        "compare": View(f"compare/{both}", PAIRS, 960, 560, "light"),
        "state": View("state", GROUPS, 960, 460, "dark"),
        "phone": View("live", HEATMAP, 360, 740, "dark"),
    }  # fmt: skip


def shoot(page: Page, path: Path) -> None:
    """Write what is seen, in few colors."""
    png = base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path}: {path.stat().st_size:,} bytes")


def opened(tab: Callable[[], Page], server: Server, view: str) -> Page:
    """Open a view with the key."""
    page = tab()
    page.open(f"{server.url}/moescope#{view}")
    page.type("#key", API_KEY)
    page.wait("document.querySelector('#status').dataset.state === 'ok'")
    return page


def draw(tab: Callable[[], Page], server: Server, out: Path, directory: Path) -> None:
    """Draw every view; a request whose prompt was sent before has rows of the prefix cache."""
    complete(server, PROMPT.format("shells"))
    ids = [complete(server, PROMPT.format(what))[0] for what in ("shells", "coins")]
    with replayed(server, directory, 400):
        opened(tab, server, "live").wait("document.querySelector('#heatmap').dataset.total > 1e5")
        for name, view in views(ids).items():
            page = opened(tab, server, view.address)
            page.call("Emulation.setScrollbarsHidden", hidden=True)
            page.look(view.width, view.height, view.scheme)
            page.wait(view.is_there)
            if view.is_there == TOKENS:  # the seventh token is the chosen one
                page.js("document.querySelectorAll('#request .token')[6].click()")
            shoot(page, out / f"page_{name}.png")
            page.close()


def main() -> None:
    """Serve, replay and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="The directory of the pictures.")
    args = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        sys.exit("no chromium: apt-get install chromium")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        with vllm_server(directory) as server, chromium(program, directory / "profile") as tab:
            draw(tab, server, args.out, directory)


if __name__ == "__main__":
    main()

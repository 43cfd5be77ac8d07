"""What `make` offers, and that the commands that only a GPU runs are ones that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.gpu import measure

ROOT = Path(__file__).parents[2]
MEASURE = "-m tests.gpu.measure "


def make(*args):
    run = subprocess.run(
        ["make", "--no-print-directory", *args],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return run.stdout


def test_help_lists_every_target_that_is_for_people():
    targets = re.findall(r"^(\S+):[^=\n]*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in make("help").splitlines()] == targets
    assert {"demo", "test", "test-e2e", "bench-gpu"} <= set(targets)


def test_the_gpu_measurement_consists_of_what_there_is(monkeypatch):
    commands = make("-n", "bench-gpu", "GPU_OPTIONS=--gate-scale 1e5").replace("\\\n", "")
    parsed = []
    for line in commands.splitlines():
        _, found, flags = line.partition(MEASURE)
        if found:
            monkeypatch.setattr(sys, "argv", ["measure", *shlex.split(flags)])
            parsed.append(measure.parse())
    assert {part for args in parsed for part in args.part} == set(measure.PARTS)
    for args in parsed:
        picked = measure.pick(args, ())
        assert args.vllm[:2] == ["--max-model-len", "8192"]
        assert args.gate_scale == 1e5
        assert {one.name.endswith("a chunk") for one in picked} == {
            "--stream-interval" in args.vllm
        }
        assert args.part != ["throughput"] or args.out.match("runs/gpu/o*.json")  # in the tables
    assert sum("--stream-interval" in args.vllm for args in parsed) == 1
    names = [
        (args.placement, arm) for args in parsed if "throughput" in args.part for arm in args.arm
    ]
    own = ("stock", "stock-again", "moescope", "counts", "installed", "routed-experts")
    one = ("detached", "detached-again", "moescope", "counts", "paused")
    assert set(names) == {("together", arm) for arm in own} | {("one-server", arm) for arm in one}

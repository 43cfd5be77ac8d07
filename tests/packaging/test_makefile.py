"""What `make` offers, and that the commands that only a GPU runs are ones that exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import plan
from benchmarks.cpu import __main__ as cpu
from benchmarks.gpu import options, run
from benchmarks.gpu.loads import workloads
from moescope.errors import CommandError

ROOT = Path(__file__).parents[2]
OUT = Path("runs/x")
GPU = run.entries(run.Asked(out=OUT, options=["--gate-scale", "1e5"], flags=["--seed", "1"]))
CPU = cpu.entries(OUT)


def make(*args):
    run = subprocess.run(
        ["make", "--no-print-directory", *args],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return run.stdout


def parsed():
    for entry in GPU:
        (command,) = entry.commands
        assert command[0] == "benchmarks.gpu.measure"
        yield options.parse(command[1:])


def test_help_lists_every_target_that_is_for_people():
    targets = re.findall(r"^(\S+):[^=\n]*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in make("help").splitlines()] == targets
    assert {"demo", "test", "test-e2e", "test-fidelity", "fidelity", "bench-gpu"} <= set(targets)


def test_make_measures_by_the_plans():
    assert "-m benchmarks.cpu --out runs/bench" in make("-n", "bench")
    wanted = "-m benchmarks.gpu.run --out runs/gpu --gate-scale 1e5 -- --seed 1"
    assert wanted in make("-n", "bench-gpu", "GPU_OPTIONS=--gate-scale 1e5", "GPU_FLAGS=--seed 1")


def test_every_sitting_is_one_that_can_be_measured():
    for entry, args in zip(GPU, parsed(), strict=True):
        picked = options.pick(args, ())
        assert picked or args.part != ["throughput"]
        assert args.vllm[:2] == ["--max-model-len", "8192"]
        assert "--seed 1" in " ".join(args.vllm)
        assert args.gate_scale == 1e5
        assert args.out == entry.raw
        assert entry.summary == OUT / "summaries" / entry.raw.name
        assert {one.name.endswith("a chunk") for one in picked} == {
            "--stream-interval" in args.vllm
        }


def test_every_part_arm_placement_and_load_is_in_the_plan():
    every = list(parsed())
    assert {part for args in every for part in args.part} == set(options.PARTS)
    assert sum("--stream-interval" in args.vllm for args in every) == 1
    with_loads = [args for args in every if "throughput" in args.part]
    own = ("stock", "stock-again", "moescope", "counts", "installed", "routed-experts")
    one = ("detached", "detached-again", "moescope", "counts", "paused")
    assert {(args.placement, arm) for args in with_loads for arm in args.arm} == {
        *(("together", arm) for arm in own),
        *(("one-server", arm) for arm in one),
    }
    named = {
        load.name for args in with_loads for load in options.pick(args, ()) if args.arm is not None
    }
    left_out = {"28 conversations of 20 turns, 256 in, 128 out"}
    assert {load.name for load in workloads()} - left_out <= named


def test_kv_caches_are_given_in_gib_with_the_reason():
    sizes = {int(args.kv_cache_gib * 2**30) for args in parsed()}
    assert sizes == {98784247808, 13958643712, 4939212390}
    assert "reason" in (ROOT / "benchmarks/gpu/plan.toml").read_text()


@pytest.mark.parametrize("entry", CPU, ids=lambda entry: entry.name)
def test_every_command_of_the_cpu_exists(entry):
    assert entry.raw.is_relative_to(OUT)
    for module, *arguments in entry.commands:
        assert importlib.util.find_spec(module) is not None
        assert not any("{" in word for word in arguments)


def test_names_are_given_once_and_unknown_ones_are_told():
    for entries in (CPU, GPU):
        names = [entry.name for entry in entries]
        assert len(names) == len(set(names))
        assert [one.name for one in plan.pick(entries, names[1:2])] == names[1:2]
        assert plan.pick(entries, None) == entries
        with pytest.raises(CommandError, match="invalid --only 'none': expected one of"):
            plan.pick(entries, ["none"])
    assert len({entry.summary for entry in CPU}) == len(CPU)

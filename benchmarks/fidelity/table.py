"""Makes the fidelity table of the cells that tests recorded.

``python -m benchmarks.fidelity.table CELLS.jsonl … --out TABLE.md``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fidelity.cells import Recorded, read

INTRODUCTION = """# Routes compared with a reference

Made by `make fidelity`; do not edit. A pair is one token in one layer. Each is compared with the
experts and weights that the reference computes for the same tokens: HF transformers' router logits
in float64, by the scheme's published formula, unless the cell says otherwise. Models are small,
random (the bundled one is trained) and in float32, unless the cell says otherwise. *Equal*: the
same set of experts, *ties* among them: two experts are as probable within the rounding of what was
served, so that either may be taken; the reference then goes on with the trace's. *Missing*: marked
as missing in the trace.
"""

NOTES = """
## Notes

* Cells of a GPU are those of `python -m benchmarks.gpu.measure`
  ([Qwen1.5-MoE's shape](../gpu/fidelity_h200.json), [gpt-oss's](../gpu/gpt_oss_h200.json)) and of
  `python -m benchmarks.gpu.situations` ([layouts, sleep, FP8](../gpu/situations_h200.json),
  [the balancer, linear attention, MTP](../gpu/situations_h200_2026-11-30.json)) and of
  `python -m benchmarks.gpu.weight_transfer` ([file](../gpu/weight_transfer_h200.json)), kept in
  `gpu.jsonl` beside this table. In the situations all rows were vLLM's own too, where it captures
  (not with pipeline stages).
* In two situations pairs are missing as they must be: those routed while the capture was held, and
  those of KV entries that another machine computed.
* Weights are what vLLM's router returns: without `routed_scaling_factor` for DeepSeek and GLM-4,
  where vLLM scales the experts' sum, with `route_scale` for AFMoE; Llama 4's multiply the experts'
  inputs.
* DeepSeek's models run with PyTorch's rotary embedding: the kernel of vLLM 0.32.0 for the CPU is
  wrong for queries of the shape that their attention hands it. Their prefixes are not cached there.
* vLLM's CPU router leaves out the selection bias of Ernie 4.5; the reference then does as well.
* Sigmoid scores without groups (MiniMax-M2) are not served on the CPU, whose router takes softmax
  there.
* Models that call their experts' kernels themselves (MiniCPM, Moondream 3), monolithic kernels that
  do not tell what they select, and dense models are refused at start. Those that do are compared
  on GPUs alone: gpt-oss's on Hopper; for Blackwell's none was at hand.
* LoRA: vLLM's CPU build serves no MoE model with it (it takes Triton kernels that are not there);
  a test compares it where there is a GPU, of which no run is recorded here. Asynchronous
  scheduling: the CPU build switches it off; on GPUs it is on by default.
* Ranks: data parallelism fails in the MoE layers of the CPU build, which has no all-to-all
  communication: it was compared on GPUs alone. Drafters with experts (MTP), linear attention on a
  GPU, FP8 and the balancer were compared with vLLM's own ids, not with HF transformers. In an
  earlier run with MTP 16,004 of 16,021 rows were vLLM's own, none was missing. Why 17 are not was
  not measured: vLLM's has the rows of whoever computed a block's prefix first.
"""


def make_table(recorded: Sequence[Recorded]) -> str:
    """Return the document. A cell that was recorded twice counts as it was recorded last."""
    last = {(r.cell.scheme, r.cell.situation, r.cell.layout, r.cell.machine): r for r in recorded}
    found = list(last.values())
    pairs = sum(r.cell.pairs for r in found)
    equal = sum(r.cell.equal for r in found)
    missing = sum(r.cell.missing for r in found)
    ties = sum(r.cell.ties for r in found)
    total = f"In all {pairs:,} pairs: {equal:,} equal, {ties:,} of them ties, {missing:,} missing; "
    total += f"{len(found)} cells."
    return "\n".join(
        [
            INTRODUCTION,
            total,
            "\n## Schemes and situations\n\nPairs / equal / missing.\n",
            *_overview(found),
            "\n## All cells\n",
            *_details(found),
            NOTES,
        ]
    )


def _overview(found: Sequence[Recorded]) -> list[str]:
    """Return the lines of schemes x situations: those that several schemes share, then the rest."""
    schemes_of: dict[str, set[str]] = {}
    for one in found:
        schemes_of.setdefault(_situation(one), set()).add(one.cell.scheme)
    shared = [one for one in found if len(schemes_of[_situation(one)]) > 1]
    rest = [one for one in found if len(schemes_of[_situation(one)]) == 1]
    lines = _matrix(shared) if shared else []
    for scheme in dict.fromkeys(one.cell.scheme for one in rest):
        lines += ["", _line([scheme, "pairs / equal / missing"]), _line(["---", "---"])]
        lines += [_line([_situation(r), _numbers(r)]) for r in rest if r.cell.scheme == scheme]
    return lines


def _matrix(found: Sequence[Recorded]) -> list[str]:
    """Return the lines of schemes (down) x situations (across)."""
    situations = list(dict.fromkeys(_situation(r) for r in found))
    lines = [_line(["scheme", *situations]), _line(["---"] * (1 + len(situations)))]
    for scheme in dict.fromkeys(r.cell.scheme for r in found):
        numbers = {_situation(r): _numbers(r) for r in found if r.cell.scheme == scheme}
        lines.append(_line([scheme, *(numbers.get(one, "") for one in situations)]))
    return lines


def _numbers(recorded: Recorded) -> str:
    cell = recorded.cell
    return f"{cell.pairs:,} / {cell.equal:,} / {cell.missing:,}"


def _situation(recorded: Recorded) -> str:
    cell = recorded.cell
    where = [cell.layout] * (cell.layout != "1 worker") + [cell.machine] * (cell.machine != "CPU")
    return ", ".join([cell.situation, *where])


def _details(found: Sequence[Recorded]) -> list[str]:
    names = ["scheme", "situation", "layout", "machine", "pairs", "equal", "ties", "missing"]
    names += ["largest weight error", "date", "versions"]
    lines = [_line(names), _line(["---"] * len(names))]
    for one in found:
        cell = one.cell
        versions = ", ".join(f"{name} {version}" for name, version in sorted(one.versions.items()))
        counts = (cell.pairs, cell.equal, cell.ties, cell.missing)
        numbers = [f"{number:,}" for number in counts]
        error = "" if cell.largest_weight_error is None else f"{cell.largest_weight_error:.1e}"
        where = [cell.scheme, cell.situation, cell.layout, cell.machine]
        lines.append(_line([*where, *numbers, error, one.date, versions]))
    return lines


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", type=Path, nargs="+", help="files of recorded cells")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args()
    args.out.write_text(make_table([one for path in args.cells for one in read(path)]))


if __name__ == "__main__":
    main()

"""Shows that every row says which weights computed it, where a trainer sends new ones meanwhile.

A server has one GPU, this process another: the trainer, that holds two checkpoints of random
weights in one shape. It sends requests whose prompts begin alike and, while they run, the other
checkpoint's weights, labeled, through vLLM's own weight transfer; then once more, for each round.
The prefix cache is not reset in between. What must be so:

* Of output rows: the number is that of the label that vLLM says the next token was sampled under.
* Of rows from the prefix cache: they are what a request with the same tokens computed before, and
  have its number.
* Of sequences of one version: HF transformers with that checkpoint routes them so, as
  `moescope verify` judges it, and with the other one does not.

It exits with 1 where one of these does not hold::

    python -m benchmarks.gpu.weight_transfer --tokenizer DIRECTORY --out runs/weight_transfer.json \
        --device cuda -- --max-num-seqs 64

``--by-files`` has the server read the checkpoints' files in place of a transfer.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from benchmarks import result
from benchmarks.gpu import judged, random_checkpoint, shapes
from moescope import RouteTrace, Source
from moescope.errors import CommandError
from moescope.servers import end_servers_on_signals, free_ports
from moescope_service.verify.completions import RoutedCompletion, VerifiedServer
from moescope_service.verify.reference import Reference

SHAPE, LAYERS = "qwen2-moe", 4
CHECKPOINTS = 2
FRESH = 8
TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A request's routes, and what vLLM says of its tokens."""

    trace: RouteTrace
    token_ids: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int64]
    """Of the weights that computed each row, ``[num_rows]``."""
    labels: list[int]
    """The number that labels the weights of each output token."""

    @property
    def completion(self) -> RoutedCompletion:
        """What is judged."""
        return RoutedCompletion(self.trace.request_id, self.token_ids, self.trace, None)


def ask(http: httpx.Client, verified: VerifiedServer, prompt: list[int], length: int) -> Answer:
    """Send one request of tokens."""
    body = {
        "token_ids": prompt,
        "sampling_params": {"max_tokens": length, "temperature": 0.0, "ignore_eos": True},
    }
    response = http.post("/inference/v1/generate", json=body).raise_for_status().json()
    (choice,) = response["choices"]
    spans = choice["weight_versions"]
    labels = [[_number(one["version"])] * (one["end"] - one["start"]) for one in spans]
    (trace,) = verified.client.routes(response["request_id"], wait_s=60)
    tokens, numbers = trace.token_ids, trace.weights_version
    if tokens is None or numbers is None:
        raise CommandError(f"{trace.request_id}: no row is there")
    return Answer(trace, tokens, numbers, list(itertools.chain(*labels)))


def _number(label: str) -> int:
    return 0 if label == "default" else int(label)


class Trainer:
    """Sends the weights of a checkpoint to a server, by vLLM's trainer of that transfer.

    Args:
        url: The server.
        checkpoints: Directories.
    """

    def __init__(self, url: str, checkpoints: Sequence[Path]) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        device = torch.cuda.device_count() - 1
        torch.cuda.set_device(device)
        loaded = [
            {
                name: tensor
                for file in sorted(one.glob("*.safetensors"))
                for name, tensor in load_file(file, device=f"cuda:{device}").items()
            }
            for one in checkpoints
        ]

        class Loaded(WeightSource):  # type: ignore[misc]
            number = 0

            def metadata(self) -> list[Any]:
                named = loaded[self.number].items()
                return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in named]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                yield from loaded[self.number].items()

        self._source = Loaded()
        (port,) = free_ports(1)
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=port, world_size=2, rank=0),
            client=HTTPVLLMWeightSyncClient(url),
            source=self._source,
        )

    def send(self, checkpoint: int) -> None:
        """Send the weights of the checkpoint with this number."""
        self._source.number = checkpoint
        self._engine.send_weights()


def change(http: httpx.Client, send: Callable[[int], None], number: int) -> None:
    """Change the server's weights for the time of this number, while its requests are held."""
    # Else the running requests lose their rows, too: vLLM computes them anew.
    http.post("/pause", params={"mode": "keep", "clear_cache": "false"}).raise_for_status()
    send(number % CHECKPOINTS)
    http.post("/update_weight_version", json={"new_version": str(number)}).raise_for_status()
    http.post("/resume").raise_for_status()


def run(url: str, checkpoints: Sequence[Path], args: argparse.Namespace) -> list[Answer]:
    """Send the requests of all rounds, and new weights in the middle of each."""
    vocabulary = json.loads((checkpoints[0] / "config.json").read_text())["vocab_size"]
    prompts = judged.make_prompts(args.requests * (args.rounds + 1), 6, vocabulary)
    answers: list[Answer] = []
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_S, limits=httpx.Limits()) as http,
        VerifiedServer(url, None) as verified,
        ThreadPoolExecutor(args.requests) as pool,
    ):

        def read(checkpoint: int) -> None:
            kwargs = {"weights_path": str(checkpoints[checkpoint])}
            body = {"method": "reload_weights", "kwargs": kwargs}
            http.post("/collective_rpc", json=body).raise_for_status()

        send = read if args.by_files else Trainer(url, checkpoints).send
        for number in range(args.rounds + 1):
            own = prompts[number * args.requests : (number + 1) * args.requests]
            running = [pool.submit(ask, http, verified, one, args.tokens) for one in own]
            if number < args.rounds:
                time.sleep(args.after_s)
                change(http, send, number + 1)
            answers += [one.result() for one in running]
            # Of one version: nothing like them is in the cache, and no change comes meanwhile.
            fresh = [one[::-1] for one in own[:FRESH]]
            answers += pool.map(lambda one: ask(http, verified, one, args.tokens), fresh)
    return answers


def against_labels(answers: Sequence[Answer]) -> dict[str, int]:
    """Compare the numbers of output rows with vLLM's labels."""
    equal = rows = 0
    for one in answers:
        own = one.numbers[one.trace.prompt_len - 1 :]
        rows += len(own)
        equal += int((own == one.labels).sum()) if len(own) == len(one.labels) else 0
    return {"rows": rows, "equal_rows": equal}


def cached(answers: Sequence[Answer]) -> dict[str, int]:
    """Look for each row from the prefix cache among those that were computed of the same tokens."""
    computed: set[tuple[bytes, int, bytes]] = set()
    for one in answers:
        computed.update(_rows(one, Source.COMPUTED))
    found = [row in computed for one in answers for row in _rows(one, Source.CACHED)]
    older = sum(
        int((one.numbers[one.trace.source == Source.CACHED] < max(one.labels)).sum())
        for one in answers
    )
    return {"rows": len(found), "found": sum(found), "of_older_weights": older}


def _rows(answer: Answer, source: Source) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield (tokens so far, number, experts) of the rows from a source."""
    for row in np.flatnonzero(answer.trace.source == source).tolist():
        so_far = answer.token_ids[: row + 1].tobytes()
        yield so_far, int(answer.numbers[row]), answer.trace.topk_ids[row].tobytes()


def against_checkpoints(
    answers: Sequence[Answer], checkpoints: Sequence[Path], device: str
) -> dict[str, Any]:
    """Judge the sequences of one version by its checkpoint, and some by the other one."""
    found: dict[str, Any] = {}
    of_one = [one for one in answers if (one.numbers == one.numbers[0]).all()]
    for number, checkpoint in enumerate(checkpoints):
        layers = answers[0].trace.layers.tolist()
        reference = Reference(str(checkpoint), layers, "float64", "bfloat16", device)
        own, other = (
            [one.completion for one in of_one if one.numbers[0] % CHECKPOINTS == which]
            for which in (number, 1 - number)
        )
        by_other = judged.judge(other[:FRESH], reference)["all"]
        found[f"checkpoint {number}"] = {
            "sequences": len(own),
            **judged.judge(own, reference),
            "of_the_other": {name: by_other[name] for name in ("pairs", "mismatches")},
        }
    return found


def is_right(measured: dict[str, Any]) -> bool:
    """Return whether all of it is as it must be, and what it is for has happened."""
    labels, hits = measured["against_labels"], measured["cached"]
    by_checkpoint = measured.get("against_checkpoints", {})
    return (
        measured["rows"]["missing"] == 0
        and labels["rows"] == labels["equal_rows"] > 0
        and hits["rows"] == hits["found"]
        and hits["of_older_weights"] > 0
        and measured["sequences_across_a_change"] > 0
        and all(
            judged.is_good(one)
            and 2 * one["of_the_other"]["mismatches"] > one["of_the_other"]["pairs"]
            for one in by_checkpoint.values()
        )
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = result.parser(__doc__ or "")
    parser.add_argument("--tokenizer", type=Path, required=True, help="A model's directory.")
    parser.add_argument("--device", default="cpu", help="Where the reference runs.")
    parser.add_argument("--requests", type=int, default=48, help="Of each round, all at once.")
    parser.add_argument("--rounds", type=int, default=3, help="Changes of the weights.")
    parser.add_argument("--tokens", type=int, default=768, help="Of each output.")
    parser.add_argument("--after-s", type=float, default=1.0, help="When new weights are sent.")
    parser.add_argument("--by-files", action="store_true", help="The server reads them instead.")
    parser.add_argument("--judge", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("vllm", nargs="*", help="After --: vLLM's flags.")
    return parser.parse_args()


def write(out: Path, measured: dict[str, Any]) -> None:
    """Write what is known so far."""
    result.write(out, "benchmarks.gpu.weight_transfer", gpu=result.gpu(), **measured)


def main() -> int:
    """Do what the command line says; return the exit status."""
    args = parse()
    end_servers_on_signals()
    directory: Path = args.out.parent
    shape = directory / f"{SHAPE}.shape"
    checkpoints = [directory / f"{SHAPE}.{seed}.model" for seed in range(CHECKPOINTS)]
    if not shape.exists():
        shapes.write(SHAPE, shape, args.tokenizer)
    for seed, one in enumerate(checkpoints):
        if not one.exists():
            random_checkpoint.write(shape, one, layers=LAYERS, seed=seed, device=args.device)
    transfer = ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    flags = ["--enable-scale-out", "--max-model-len", "2048", *args.vllm]
    flags += [] if args.by_files else transfer
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    log = directory / "weight_transfer.log"
    with judged.serving("weight_transfer", [str(checkpoints[0]), *flags], log, env) as server:
        answers = run(server.url, checkpoints, args)
    measured: dict[str, Any] = {
        "shape": f"{SHAPE}, {LAYERS} layers",
        "flags": flags,
        "changes": args.rounds,
        "requests": len(answers),
        "rows": judged.rows([one.completion for one in answers]),
        "sequences_across_a_change": sum(len(set(one.labels)) > 1 for one in answers),
        "against_labels": against_labels(answers),
        "cached": cached(answers),
    }
    if args.judge:
        write(args.out, measured)  # the references may take long
        found = against_checkpoints(answers, checkpoints, args.device)
        measured["against_checkpoints"] = found
    write(args.out, measured)
    print(args.out.read_text())
    return 0 if is_right(measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())

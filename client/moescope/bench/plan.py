"""What a load test sends, when and how, as the command line describes it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import orjson

from moescope import datasets
from moescope.bench import result, workload
from moescope.bench.driver import Pace
from moescope.bench.schedule import RampUp, due_times
from moescope.bench.workload import Conversation, Endpoint, RequestOptions
from moescope.errors import CommandError

DATASETS = (*datasets.NAMES, "random")
"""What ``--dataset-name`` takes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to send, when and how; the command's options, which its help describes."""

    model: str | None = None
    endpoint: str | None = None
    dataset_name: str = "sample"
    file: Path | None = None
    num_prompts: int = 100
    turns: int = 1
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    token_range: tuple[int, int] = workload.RANDOM_TOKENS
    max_concurrency: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    num_warmups: int = 0
    ignore_eos: bool | None = None
    temperature: float = 0.0
    seed: int | None = None
    extra_body: str = "{}"

    @property
    def is_random(self) -> bool:
        """Whether prompts are random token ids."""
        return self.dataset_name == "random"

    def conversations(self) -> tuple[list[Conversation], list[Conversation]]:
        """Return the conversations of the warm-up and those that count.

        Raises:
            DatasetError: The data set cannot be read.
            CommandError: There is no such data set, or the range of token ids is empty.
        """
        if self.dataset_name not in DATASETS:
            *others, last = DATASETS
            raise CommandError(
                f"invalid --dataset-name {self.dataset_name!r}: expected {', '.join(others)} or "
                f"{last}"
            )
        if self.is_random and self.file:
            raise CommandError(f"invalid --file '{self.file}' for --dataset-name random")
        num = self.num_warmups + self.num_prompts
        if not self.is_random:
            texts = [one.question for one in datasets.load(self.dataset_name, self.file)]
            made = workload.from_texts(
                texts, num_conversations=num, turns=self.turns, max_tokens=self.output_len
            )
        else:
            low, high = self.token_range
            if not 0 <= low < high:
                raise CommandError(
                    f"invalid --token-range {low} {high}: expected two ids, the second larger"
                )
            made = workload.random_tokens(
                num_conversations=num,
                turns=self.turns,
                input_len=self.input_len,
                output_len=self.output_len,
                range_ratio=self.range_ratio,
                prefix_len=self.prefix_len,
                token_range=self.token_range,
                seed=self.seed or 0,
            )
        return made[: self.num_warmups], made[self.num_warmups :]

    def request_options(self, model: str) -> RequestOptions:
        """Return how every request is sent.

        Raises:
            CommandError: The endpoint or the extra body is malformed.
        """
        endpoint: Endpoint = "completions" if self.is_random else "chat"
        if self.endpoint is not None:
            if self.endpoint not in workload.PATHS:
                raise CommandError(
                    f"invalid --endpoint {self.endpoint!r}: expected chat or completions"
                )
            endpoint = self.endpoint
        if self.is_random and endpoint == "chat":
            raise CommandError(
                "invalid --endpoint 'chat' for --dataset-name random: token ids go to completions"
            )
        return RequestOptions(
            model=model,
            endpoint=endpoint,
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=self.is_random if self.ignore_eos is None else self.ignore_eos,
            extra_body=_json_object(self.extra_body),
        )

    def pace(self) -> Pace:
        """Return when conversations start.

        Raises:
            CommandError: A rate is malformed.
        """
        ramp_up = self._ramp_up()
        if self.max_concurrency and math.isinf(self.request_rate) and not ramp_up:
            return Pace(max_concurrency=self.max_concurrency)
        due_s = due_times(
            self.num_prompts,
            request_rate=self.request_rate,
            burstiness=self.burstiness,
            ramp_up=ramp_up,
            seed=self.seed or 0,
        )
        return Pace(max_concurrency=self.max_concurrency, due_s=due_s.tolist())

    def requested_load(self, request: RequestOptions, num_requests: int) -> result.RequestedLoad:
        """Return what the result file says of it."""
        ramp_up = self._ramp_up()
        options = dataclasses.asdict(self)
        options["request_rate"] = options["request_rate"] if self.request_rate < math.inf else "inf"
        options["file"] = self.file.name if self.file else None
        return result.RequestedLoad(
            model=request.model,
            endpoint=request.endpoint,
            num_prompts=num_requests,
            request_rate=self.request_rate,
            burstiness=self.burstiness,
            max_concurrency=self.max_concurrency,
            ramp_up=None
            if ramp_up is None
            else {
                "ramp_up_strategy": ramp_up.strategy,
                "ramp_up_start_rps": ramp_up.start_rps,
                "ramp_up_end_rps": ramp_up.end_rps,
            },
            options=options,
        )

    def words(self) -> str:
        """Return what the load is, in words."""
        load = f"{self.num_prompts} conversations of {self.dataset_name}"
        if self.turns > 1:
            load += f", {self.turns} turns each"
        if self.request_rate < math.inf:
            load += f", {self.request_rate:g} a second (burstiness {self.burstiness:g})"
        if ramp_up := self._ramp_up():
            rates = f"{ramp_up.start_rps:g} to {ramp_up.end_rps:g} a second"
            load += f", {rates} ({ramp_up.strategy}, burstiness {self.burstiness:g})"
        if self.max_concurrency:
            load += f", {self.max_concurrency} at a time"
        return load

    def _ramp_up(self) -> RampUp | None:
        given = (self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps)
        if given == (None, None, None):
            return None
        strategy, start, end = given
        if strategy not in {"linear", "exponential"} or start is None or end is None:
            raise CommandError(
                f"invalid ramp-up {strategy!r} from {start} to {end}: expected --ramp-up-strategy "
                "linear or exponential, --ramp-up-start-rps and --ramp-up-end-rps"
            )
        return RampUp(strategy=strategy, start_rps=start, end_rps=end)  # type: ignore[arg-type]


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise CommandError(f"invalid --extra-body {text!r}: expected a JSON object")
    return values

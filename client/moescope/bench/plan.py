"""A load test as it is asked for, and what follows from that."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from moescope import datasets
from moescope.bench import latency, result, session, table, workload
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.schedule import RampUp, due_times
from moescope.bench.workload import Ask, Conversation, Endpoint
from moescope.errors import CommandError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask, when and how; the command's options, which its help describes."""

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
    seed: int = 0
    extra_body: str = "{}"

    @property
    def is_random(self) -> bool:
        """Whether prompts are random token ids."""
        return self.dataset_name == "random"

    def conversations(self) -> tuple[list[Conversation], list[Conversation]]:
        """Return the conversations of the warm-up and those that count.

        Raises:
            DatasetError: The data set cannot be read.
            CommandError: The range of token ids is empty.
        """
        num = self.num_warmups + self.num_prompts
        if not self.is_random:
            texts = [one.question for one in datasets.load(self.dataset_name, self.file)]
            made = workload.from_texts(
                texts, num_conversations=num, turns=self.turns, max_tokens=self.output_len
            )
        else:
            low, high = self.token_range
            if not 0 <= low < high:
                raise CommandError(f"the range of token ids {low} to {high} is empty")
            made = workload.random_tokens(
                num_conversations=num,
                turns=self.turns,
                input_len=self.input_len,
                output_len=self.output_len,
                range_ratio=self.range_ratio,
                prefix_len=self.prefix_len,
                token_range=self.token_range,
                seed=self.seed,
            )
        return made[: self.num_warmups], made[self.num_warmups :]

    def ask(self, model: str) -> Ask:
        """Return how every request is asked.

        Raises:
            CommandError: The endpoint or the further fields are malformed.
        """
        endpoint: Endpoint = "completions" if self.is_random else "chat"
        if self.endpoint is not None:
            if self.endpoint not in workload.PATHS:
                raise CommandError(f"{self.endpoint!r} is no endpoint: take chat or completions")
            endpoint = self.endpoint
        return Ask(
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
            seed=self.seed,
        )
        return Pace(max_concurrency=self.max_concurrency, due_s=due_s.tolist())

    def setting(self, ask: Ask, num_requests: int) -> result.Setting:
        """Return what the result file says of it."""
        ramp_up = self._ramp_up()
        options = dataclasses.asdict(self)
        options["request_rate"] = options["request_rate"] if self.request_rate < math.inf else "inf"
        options["file"] = self.file.name if self.file else None
        return result.Setting(
            model=ask.model,
            endpoint=ask.endpoint,
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

    def _ramp_up(self) -> RampUp | None:
        given = (self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps)
        if given == (None, None, None):
            return None
        strategy, start, end = given
        if strategy not in {"linear", "exponential"} or start is None or end is None:
            raise CommandError(
                "a ramp-up needs --ramp-up-strategy linear or exponential, --ramp-up-start-rps "
                "and --ramp-up-end-rps"
            )
        return RampUp(strategy=strategy, start_rps=start, end_rps=end)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What to make of a run."""

    goodput: tuple[str, ...] = ()
    metrics: str = ",".join(latency.METRICS)
    percentiles: str = "50,90,99"
    result: Path | None = None
    save_detailed: bool = False
    plot: Path | None = None

    def parsed(self) -> tuple[list[str], list[float], dict[str, float]]:
        """Return the metrics, percentiles and limits.

        Raises:
            CommandError: One of them is malformed.
        """
        names = self.metrics.split(",")
        if unknown := [name for name in names if name not in latency.METRICS]:
            raise CommandError(f"{unknown[0]!r} is no latency: take of {','.join(latency.METRICS)}")
        try:
            percentiles = [float(item) for item in self.percentiles.split(",")]
        except ValueError:
            percentiles = [-1.0]
        if not all(0 <= percentile <= 100 for percentile in percentiles):
            raise CommandError(f"{self.percentiles!r} are no percentiles: such as 50,99,99.9")
        return names, percentiles, latency.parse_goodput(self.goodput)


def run(plan: Plan, target: Target, report: Report, console: Console) -> Run:
    """Run a load test, show its figures, write its files.

    Raises:
        MoescopeError: Something asked for is malformed, the server does not answer, or not one
            request was answered.
    """
    names, percentiles, limits = report.parsed()
    warm_up, conversations = plan.conversations()
    pace = plan.pace()
    ask = plan.ask(plan.model or session.served_model(target))
    measured = session.run(conversations, ask, target, pace, warm_up=warm_up, console=console)
    summary = latency.summarize(
        measured.records,
        measured.duration_s,
        cpu_s=measured.cpu_s,
        percentiles=percentiles,
        goodput_ms=limits,
    )
    console.print(table.render(summary, metrics=names, interrupted=measured.interrupted))
    if report.result:
        values = result.build(
            measured,
            summary,
            plan.setting(ask, measured.num_requests),
            metrics=names,
            detailed=report.save_detailed,
        )
        result.write(report.result, values)
        console.print(report.result)
    if report.plot:
        from moescope.bench import plot  # noqa: PLC0415 - matplotlib is slow to import

        plot.draw(report.plot, measured.records, measured.duration_s, _subtitle(plan, ask.model))
        console.print(report.plot)
    if not summary.completed:
        first = next((one.error for one in measured.records), "stopped before the first answer")
        raise CommandError(f"no request was answered: {first}")
    return measured


def _subtitle(plan: Plan, model: str) -> str:
    load = f"{plan.num_prompts} conversations of {plan.dataset_name}"
    if plan.request_rate < math.inf:
        load += f", {plan.request_rate:g} a second (burstiness {plan.burstiness:g})"
    if plan.max_concurrency:
        load += f", {plan.max_concurrency} at a time"
    return f"{model}: {load}"


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise CommandError(f"--extra-body wants a JSON object, not {text!r}")
    return values

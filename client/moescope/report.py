"""report.md: a run in one page, made from the files of its directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moescope import analysis, replay, routes_log
from moescope.overhead import timing
from moescope.run_dir import RunDir


def write(run_dir: RunDir, num_experts: int | None = None) -> None:
    """Write report.md about what the directory holds so far.

    Args:
        run_dir: The directory.
        num_experts: Routed experts a layer, for a route log that does not say it.

    Raises:
        FormatError: A file of the directory is malformed.
    """
    sections = ["# A moescope run"]
    if run_dir.responses.exists():
        sections.append(_replay(replay.read_responses(run_dir.responses)))
    if run_dir.routes.exists():
        routes = routes_log.read(run_dir.routes, num_experts)
        sections += [_routes(routes), _balance(routes)]
    pictures = [path.name for path in (run_dir.histogram, run_dir.layers) if path.exists()]
    sections += [f"![{name}]({name})" for name in pictures]
    if run_dir.timing.exists():
        sections.append(_overhead(timing.read(run_dir.timing)))
        if run_dir.overhead.exists():
            sections.append(f"![{run_dir.overhead.name}]({run_dir.overhead.name})")
    run_dir.report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def subtitle(routes: routes_log.LoggedRoutes) -> str:
    """Return one line about a route log."""
    return (
        f"{routes.meta['model_id']} · {routes.sequences:,} sequences · "
        f"{routes.rows:,} routed tokens · top-{routes.meta['top_k']} of {routes.num_experts}"
    )


def _replay(responses: Sequence[replay.Response]) -> str:
    failed = sum(response.error is not None for response in responses)
    tokens = sum(response.completion_tokens for response in responses)
    wall_s = max((item.started_s + item.latency_s for item in responses), default=0.0)
    rate = f", {tokens / wall_s:,.1f} tokens/s" if wall_s else ""
    return (
        f"## Replay\n\n{len(responses)} prompts, {failed} failed; "
        f"{sum(response.prompt_tokens for response in responses):,} prompt tokens, "
        f"{tokens:,} completion tokens in {wall_s:.1f} s{rate}."
    )


def _routes(routes: routes_log.LoggedRoutes) -> str:
    meta = routes.meta
    torn = f", {routes.torn_lines:,} lines of the log cut off" if routes.torn_lines else ""
    return (
        f"## Routes\n\n{subtitle(routes)}; {routes.missing_rows:,} rows missing{torn}.\n\n"
        f"vLLM {meta['vllm_version']}, torch {meta['torch_version']}, on {meta['device']}, "
        f"seed {meta['seed']}."
    )


def _balance(routes: routes_log.LoggedRoutes) -> str:
    columns = zip(
        routes.layers,
        analysis.normalized_entropy(routes.counts),
        analysis.max_violation(routes.counts),
        analysis.active_experts(routes.counts),
        routes.counts,
        strict=True,
    )
    rows = (
        (
            str(layer),
            f"{entropy:.3f}",
            f"{violation:.2f}",
            f"{active} of {routes.num_experts}",
            ", ".join(
                f"{expert} ({share:.1%})" for expert, _, share in analysis.top_experts(counts)
            ),
        )
        for layer, entropy, violation, active, counts in columns
    )
    header = ("layer", "normalized entropy", "MaxVio", "active experts", "top experts")
    return "## Balance\n\n" + _table(header, rows)


def _overhead(values: dict[str, Any]) -> str:
    said = ".\n\n".join(text[0].upper() + text[1:] for text in timing.statements(values))
    rows = (
        (
            name,
            f"{arm['wall_s']:.2f}",
            f"{arm['completion_tokens']:,}",
            f"{arm['tokens_per_s']:,.1f}",
            f"{arm['metrics']['median_ttft_ms']:.1f}",
            f"{arm['metrics']['median_tpot_ms']:.2f}",
        )
        for name, arm in values["arms"].items()
    )
    header = ("arm", "wall time (s)", "completion tokens", "tokens/s", "TTFT (ms)", "TPOT (ms)")
    hardware, within = values["hardware"], values["token_ids"]["within_arm"]
    first = next(iter(values["arms"]))
    same = ", ".join(
        f"{one['same']} of {one['compared']} between {first} and {name}"
        for name, one in values["token_ids"]["between_arms"].items()
    )
    refused = "".join(f"\n\nLeft out: {reason}." for reason in values["refused"].values())
    return (
        f"## Overhead\n\n{said}.\n\n{_table(header, rows)}\n\nTTFT and TPOT are means of the "
        f"rounds' medians. Outputs with the same token ids: {same}, {within['same']} of "
        f"{within['compared']} within an arm from one round to the next.{refused}\n\nMeasured on "
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['ram_gib']} GiB RAM, "
        f"{values['date']}."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""report.md: a run in one page, made from the files of its directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moescope import analysis, replay, routes_log, timing
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
    return (
        f"## Routes\n\n{subtitle(routes)}; {routes.missing_rows:,} rows missing.\n\n"
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
    rows = (
        (
            label,
            f"{values[arm]['wall_s']:.2f}",
            f"{values[arm]['completion_tokens']:,}",
            f"{values[arm]['tokens_per_s']:,.1f}",
        )
        for arm, label in (("no_log", "without capture"), ("log", "with capture"))
    )
    header = ("arm", "wall time (s)", "completion tokens", "tokens/s")
    hardware, between = values["hardware"], values["token_ids"]["between_arms"]
    within = values["token_ids"]["within_arm"]
    statement = values["overhead"]["statement"]
    return (
        f"## Overhead\n\n{statement[0].upper()}{statement[1:]}.\n\n{_table(header, rows)}\n\n"
        f"Outputs with the same token ids: {between['same']} of {between['compared']} between "
        f"the arms, {within['same']} of {within['compared']} within an arm from one round to the "
        f"next.\n\nMeasured on {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['ram_gib']} GiB RAM, {values['date']}."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""report.md: a run on one page, made from the files of its directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moescope import analysis, files, prompts, replay, route_files, routes_log
from moescope.overhead import timing
from moescope.run_dir import RunDir


def write(run_dir: RunDir, routes: routes_log.LoggedRoutes | None = None) -> None:
    """Write report.md about what the directory holds so far.

    Args:
        run_dir: The directory.
        routes: What its routes are; read where None.

    Raises:
        FormatError: A file of the directory is malformed.
        OSError: It cannot be written.
    """
    sections = ["# A moescope run"]
    if run_dir.responses.exists():
        num_prompts = len(prompts.read(run_dir.prompts)) if run_dir.prompts.exists() else None
        sections.append(_replay(replay.read_responses(run_dir.responses), num_prompts))
    if routes is None and run_dir.routes.exists():
        routes = route_files.counted(run_dir.routes)
    if routes is not None:
        sections += [_routes(routes), _balance(routes)]
    pictures = [path.name for path in (run_dir.histogram, run_dir.layers) if path.exists()]
    sections += [f"![{name}]({name})" for name in pictures]
    if run_dir.timing.exists():
        sections.append(_overhead(timing.read(run_dir.timing)))
        if run_dir.overhead.exists():
            sections.append(f"![{run_dir.overhead.name}]({run_dir.overhead.name})")
    files.write(run_dir.report, ("\n\n".join(sections) + "\n").encode())


def subtitle(routes: routes_log.LoggedRoutes) -> str:
    """Return one line about a route log."""
    return (
        f"{routes.meta['model_id'] or 'unknown model'} · {routes.sequences:,} sequences · "
        f"{routes.rows:,} routed tokens · top-{routes.meta['top_k']} of {routes.num_experts}"
    )


def _replay(responses: Sequence[replay.Response], num_prompts: int | None) -> str:
    failed = sum(response.error is not None for response in responses)
    num_left = max(0, (num_prompts or 0) - len(responses))
    left = f", {num_left} not sent" if num_left else ""
    tokens = sum(response.completion_tokens for response in responses)
    wall_s = max((response.end_s for response in responses), default=0.0)
    rate = f", {tokens / wall_s:,.1f} tokens/s" if wall_s else ""
    return (
        f"## Replay\n\n{len(responses) + num_left} prompts, {failed} failed{left}; "
        f"{sum(response.prompt_tokens for response in responses):,} prompt tokens, "
        f"{tokens:,} completion tokens in {wall_s:.1f} s{rate}."
    )


def _routes(routes: routes_log.LoggedRoutes) -> str:
    meta = {name: "unknown" if value is None else value for name, value in routes.meta.items()}
    inferred = "; ".join(routes.inferred)
    note = f"\n\nInferred from the records, since the log does not say it: {inferred}."
    torn = f", {routes.torn_lines:,} lines of the log cut off" if routes.torn_lines else ""
    return (
        f"## Routes\n\n{subtitle(routes)}; {routes.missing_rows:,} rows missing{torn}.\n\n"
        f"vLLM {meta['vllm_version']}, torch {meta['torch_version']}, on {meta['device']}, "
        f"seed {meta['seed']}.{note if inferred else ''}"
    )


def _balance(routes: routes_log.LoggedRoutes) -> str:
    counts = routes.counts
    columns = zip(
        routes.layers,
        analysis.entropy_bits(counts),
        analysis.normalized_entropy(counts),
        analysis.max_violation(counts),
        analysis.active_experts(counts),
        counts,
        strict=True,
    )
    lines = (
        (
            str(layer),
            f"{bits:.2f}",
            f"{normalized:.3f}",
            f"{violation:.2f}",
            f"{active} of {routes.num_experts}",
            ", ".join(
                f"{expert} ({share:.1%})" for expert, _, share in analysis.top_experts(selections)
            ),
        )
        for layer, bits, normalized, violation, active, selections in columns
    )
    highest = f"{analysis.max_entropy_bits(routes.num_experts):.2f}"
    header = (
        *("layer", f"entropy (bits, of {highest})", "normalized entropy", "MaxVio"),
        *("active experts", "top experts"),
    )
    return f"## Balance\n\n{_over_layers(routes)}{_table(header, lines)}"


def _over_layers(routes: routes_log.LoggedRoutes) -> str:
    """Return the mean and the worst layer in words; nothing where there is no selection."""
    if not routes.counts.any():
        return ""
    balance = analysis.Balance.of(routes.counts)
    entropy, normalized = balance.entropy_bits, balance.normalized_entropy
    violation, highest = balance.max_violation, balance.max_entropy_bits
    return (
        f"Entropy of a layer's selections: {entropy.mean:.2f} of log2({balance.num_experts}) = "
        f"{highest:.2f} bits on average (normalized {normalized.mean:.3f}), lowest "
        f"{entropy.worst:.2f} bits ({normalized.worst:.3f}) in layer "
        f"{routes.layers[entropy.worst_place]}. MaxVio: {violation.mean:.2f} on average, highest "
        f"{violation.worst:.2f} in layer {routes.layers[violation.worst_place]}.\n\n"
    )


def _overhead(values: dict[str, Any]) -> str:
    said = ".\n\n".join(text[0].upper() + text[1:] for text in timing.statements(values))
    lines = (
        (
            name,
            *_sums(arm),
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
        f"## Overhead\n\n{said}.{_plain(values)}\n\n{_table(header, lines)}\n\n"
        f"TTFT and TPOT are means of the rounds' medians. Outputs with the same token ids: {same}, "
        f"{within['same']} of {within['compared']} within an arm from one round to the next."
        f"{refused}\n\nMeasured on {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['ram_gib']} GiB RAM, {values['date']}."
    )


def _plain(values: dict[str, Any]) -> str:
    """Return the sums with and without logging, and what logging adds."""
    if "log" not in values:
        return ""
    overhead = timing.plain(values)

    def more(name: str, form: str) -> str:
        return f"{overhead[name]:+,{form}} ({overhead[f'{name}_percent']:+.1f}%)"

    lines = [
        ("no logging", *_sums(values["no_log"])),
        ("with logging", *_sums(values["log"])),
        (
            "overhead",
            more("wall_s", ".2f"),
            more("completion_tokens", "d"),
            more("tokens_per_s", ".1f"),
        ),
    ]
    table = _table(("", "wall time (s)", "tokens", "tokens/s"), lines)
    return f"\n\n{table}\n\nSums of {len(values['rounds'])} rounds, as they were measured."


def _sums(total: dict[str, Any]) -> tuple[str, str, str]:
    return (
        f"{total['wall_s']:.2f}",
        f"{total['completion_tokens']:,}",
        f"{total['tokens_per_s']:,.1f}",
    )


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)

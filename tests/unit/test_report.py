import numpy as np
import orjson
import pytest
from client_fakes import make_trace

from moescope import CommandError, FormatError, analysis, environment, formats, replay, report
from moescope.overhead import comparison, timing
from moescope.overhead.rounds import Pass, Round
from moescope.run_dir import RunDir


def response(index, **changes):
    values = {
        "index": index,
        "prompt": "p",
        "request_id": "r",
        "started_s": index,
        "latency_s": 1.5,
    }
    return replay.Response(**{**values, "prompt_tokens": 5, "completion_tokens": 10, **changes})


ARMS = ("stock", "stock-again", "moescope")


def overhead_pass(wall_s):
    return Pass(
        wall_s=wall_s,
        prompt_tokens=1,
        completion_tokens=8,
        metrics=dict.fromkeys(comparison.METRICS, 5.0) | {"s_per_token": wall_s / 8},
        token_ids=[[1]],
    )


def fill(run_dir):
    replay.write_responses(run_dir.responses, [response(0), response(1)])
    meta = formats.meta_line(
        model="m",
        versions={"vllm": "0.32.0", "torch": "2.13.0"},
        device="cpu",
        seed=7,
        layers=[0, 1, 3],
        top_k=4,
        num_experts=60,
    )
    run_dir.routes.write_bytes(meta + b"".join(formats.route_lines(make_trace(num_rows=12))))
    run_dir.histogram.touch()
    passes = dict(zip(ARMS, map(overhead_pass, (2.0, 2.0, 2.5)), strict=True))
    rounds = [Round(order=ARMS, passes=passes)] * 3
    values = {
        **timing.summarize(rounds, 0),
        "refused": {"routed-experts": "routed-experts: vLLM refuses it here"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "ram_gib": 23.5},
        "date": "2026-01-02T03:04:05+00:00",
    }
    run_dir.timing.write_bytes(orjson.dumps(values))


def test_a_report_of_a_whole_run(tmp_path):
    run_dir = RunDir(tmp_path)
    fill(run_dir)
    report.write(run_dir)
    text = run_dir.report.read_text()
    assert (
        "2 prompts, 0 failed; 10 prompt tokens, 20 completion tokens in 2.5 s, 8.0 tokens/s."
        in text
    )
    assert "m · 1 sequences · 12 routed tokens · top-4 of 60; 0 rows missing." in text
    assert "vLLM 0.32.0, torch 2.13.0, on cpu, seed 7." in text
    assert text.count("of 60 |") == 3
    assert "| layer | entropy (bits, of 5.91) | normalized entropy | MaxVio |" in text
    counts = make_trace(num_rows=12).counts()
    bits, violation = analysis.entropy_bits(counts), analysis.max_violation(counts)
    assert (
        f"Entropy of a layer's selections: {bits.mean():.2f} of log2(60) = 5.91 bits on average "
        f"(normalized {bits.mean() / np.log2(60):.3f}), lowest {bits.min():.2f} bits "
        f"({bits.min() / np.log2(60):.3f}) in layer {[0, 1, 3][bits.argmin()]}. MaxVio: "
        f"{violation.mean():.2f} on average, highest {violation.max():.2f} in layer "
        f"{[0, 1, 3][violation.argmax()]}."
    ) in text
    assert f"| 3 | {bits[2]:.2f} | {bits[2] / np.log2(60):.3f} | {violation[2]:.2f} |" in text
    assert "![expert_hist.png](expert_hist.png)" in text
    assert "expert_layers.png" not in text
    assert (
        "|  | wall time (s) | tokens | tokens/s |\n| --- | --- | --- | --- |\n"
        "| no logging | 6.00 | 24 | 4.0 |\n| with logging | 7.50 | 24 | 3.2 |\n"
        "| overhead | +1.50 (+25.0%) | +0 (+0.0%) | -0.8 (-20.0%) |\n"
    ) in text
    assert "| moescope | 7.50 | 24 | 3.2 | 5.0 | 5.00 |" in text
    assert "3 of 3 between stock and moescope, 6 of 6 within an arm" in text
    assert "Capture changes the wall time per token by +25.00%" in text
    assert "Left out: routed-experts: vLLM refuses it here." in text
    assert "Some CPU, 2 cores, 23.5 GiB RAM, 2026-01-02T03:04:05+00:00." in text


def test_a_comparison_of_other_servers_has_no_table_of_logging(tmp_path):
    run_dir = RunDir(tmp_path)
    fill(run_dir)
    values = orjson.loads(run_dir.timing.read_bytes())
    del values["no_log"], values["log"]
    run_dir.timing.write_bytes(orjson.dumps(values))
    report.write(run_dir)
    assert "with logging" not in run_dir.report.read_text()


def test_what_a_log_does_not_say_is_told(tmp_path):
    run_dir = RunDir(tmp_path)
    lines = b"".join(formats.route_lines(make_trace(num_rows=12)))
    run_dir.routes.write_bytes(lines)
    report.write(run_dir)
    text = run_dir.report.read_text()
    assert "unknown model · 1 sequences · 12 routed tokens · top-4 of " in text
    assert "vLLM unknown, torch unknown, on unknown, seed unknown." in text
    assert (
        "Inferred from the records, since the log does not say it: layers 0, 1, 3; top-4; " in text
    )


def test_a_report_of_a_run_that_has_just_begun(tmp_path):
    run_dir = RunDir(tmp_path)
    replay.write_responses(run_dir.responses, [response(0, error="HTTP 500", completion_tokens=0)])
    report.write(run_dir)
    assert "1 prompts, 1 failed" in run_dir.report.read_text()
    assert "##" not in run_dir.report.read_text().replace("## Replay", "")


def test_a_malformed_timing_is_refused(tmp_path):
    run_dir = RunDir(tmp_path)
    for text in ("nonsense", "{}"):
        run_dir.timing.write_text(text)
        with pytest.raises(FormatError, match=r"timing\.json"):
            report.write(run_dir)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_routes_that_are_damaged_are_refused(tmp_path, form):
    run_dir = RunDir(tmp_path)
    run_dir.routes_as(form).write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=f"moe_routes.{form}: no file of routes"):
        report.write(run_dir)


def test_clearing_leaves_what_is_no_result(tmp_path):
    run_dir = RunDir(tmp_path)
    fill(run_dir)
    report.write(run_dir)
    (tmp_path / "notes.txt").touch()
    run_dir.clear_routes()
    run_dir.clear_comparison()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "responses.jsonl"]


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="cannot make"):
        RunDir(tmp_path / "file" / "run").create()


def test_the_cpus_name_is_read_where_there_is_one(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU: v2\nprocessor\t: 1\n")
    assert environment.cpu_model(cpuinfo) == "Some CPU: v2"
    cpuinfo.write_text("processor : 0\n")
    assert environment.cpu_model(cpuinfo)
    assert environment.hardware()["cores"] >= 1

import orjson
import pytest
from client_fakes import make_trace

from moescope import CommandError, FormatError, environment, formats, replay, report
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


def overhead_pass():
    return Pass(
        wall_s=2.0,
        prompt_tokens=1,
        completion_tokens=8,
        metrics=dict.fromkeys(comparison.METRICS, 5.0),
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
    made = overhead_pass()
    rounds = [Round(order=ARMS, passes=dict.fromkeys(ARMS, made))] * 3
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
    assert "![expert_hist.png](expert_hist.png)" in text
    assert "expert_layers.png" not in text
    assert "| moescope | 6.00 | 24 | 4.0 | 5.0 | 5.00 |" in text
    assert "3 of 3 between stock and moescope, 6 of 6 within an arm" in text
    assert "Capture changes the wall time per token by +0.00%" in text
    assert "Left out: routed-experts: vLLM refuses it here." in text
    assert "Some CPU, 2 cores, 23.5 GiB RAM, 2026-01-02T03:04:05+00:00." in text


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


def test_clear_removes_a_runs_files_and_nothing_else(tmp_path):
    run_dir = RunDir(tmp_path)
    fill(run_dir)
    (tmp_path / "notes.txt").touch()
    run_dir.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


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

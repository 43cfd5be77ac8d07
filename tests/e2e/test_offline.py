"""``vllm.LLM`` in a script: every finished request is in the log, and its routes are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from moescope_service import bundled_model

from .test_refusals import dense_model

TIMEOUT_S = 400

START = """
import gc, json, sys
import vllm
from vllm import SamplingParams

def make(model, **options):
    return vllm.LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32,
                    max_num_batched_tokens=128, max_num_seqs=8, seed=0, **options)

def show(outputs, **more):
    for one in outputs:
        choices = [[*one.prompt_token_ids, *choice.token_ids] for choice in one.outputs]
        print("OUT", json.dumps({"id": one.request_id, "choices": choices, **more}), flush=True)
"""

WORK = """
from moescope_service import offline

PROMPTS = ["Leo reads 9 pages a day for %d days. How many pages?" % n for n in (2, 3, 4)]
SHORT = SamplingParams(temperature=0, max_tokens=12)

def run(llm):
    outputs = llm.generate(PROMPTS, SamplingParams(n=2, seed=1, max_tokens=20), use_tqdm=False)
    outputs += llm.chat([{"role": "user", "content": PROMPTS[0]}], SHORT, use_tqdm=False)
    outputs += llm.generate(PROMPTS[0], SamplingParams(max_tokens=20, stop=["1"]), use_tqdm=False)
    off = SamplingParams(max_tokens=5, extra_args={"moescope": "off"})
    opted_out = llm.generate(PROMPTS[1], off, use_tqdm=False)
    found = offline.routes(llm, outputs + opted_out)
    assert found.pop() == []
    for output, traces in zip(outputs, found, strict=True):
        assert [trace.index for trace in traces] == list(range(len(output.outputs)))
        assert all(trace.complete and trace.request_id == output.request_id for trace in traces)
    return outputs

first = make(sys.argv[1])
outputs = run(first)
show(outputs, llm=1)
del first
gc.collect()
second = make(sys.argv[1])
show(run(second), llm=2)
try:
    # The first's request 3 was no chat here: the same id, other tokens.
    offline.routes(second, [outputs[0].__class__(**{**vars(outputs[0]), "request_id": "3"})])
except ValueError as error:
    print("REFUSED", error)
show(second.generate(PROMPTS[2], SHORT, use_tqdm=False), llm=2)
engine = second.llm_engine
engine.add_request("aborted", PROMPTS[1], SamplingParams(max_tokens=400, ignore_eos=True))
outputs = []
while not outputs:
    outputs = engine.step()
show(outputs, llm=2)
engine.abort_request(["aborted"])
assert not engine.has_unfinished_requests()  # ends with the script
"""


def run_script(code: str, model: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOESCOPE")}
    return subprocess.run(
        [sys.executable, "-P", "-c", START + code, str(model)],
        env={**clean, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **env},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def outputs_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("OUT ")]
    return [json.loads(line.removeprefix("OUT ")) for line in lines]


def logs_of(path: Path) -> list[dict[tuple[str, int], dict[int, list[Any]]]]:
    """Return the ids by (request, choice) and layer, in the order of their tokens, of each LLM."""
    logs: list[Any] = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["type"] == "meta":
            assert record["layers_logged"] == [0, 2]
            logs.append(defaultdict(lambda: defaultdict(list)))
            continue
        ids = logs[-1][record["req_id"], record["index"]][record["layer"]]
        assert record["token_idx"] == len(ids)
        ids.append(record["topk_ids"])
    return logs


@pytest.mark.parametrize("processes", ["0", "1"])
def test_every_finished_request_is_logged_under_its_id(tmp_path: Path, processes: str) -> None:
    log = tmp_path / "routes.jsonl"
    done = run_script(
        WORK,
        bundled_model.path(),
        VLLM_LOG_MOE=str(log),
        VLLM_LOG_MOE_LAYER="0,2",
        VLLM_ENABLE_V1_MULTIPROCESSING=processes,
    )
    assert done.returncode == 0, done.stderr
    assert "REFUSED the output '3' has other tokens" in done.stdout
    outputs = outputs_of(done)
    assert len(outputs) == 5 + 5 + 1 + 1
    assert "did not come in time" not in done.stderr
    logs = logs_of(log)
    assert len(logs) == 2, "one meta line of each LLM"
    wanted: list[set[tuple[str, int]]] = [set(), set()]
    for output in outputs:
        for index, tokens in enumerate(output["choices"]):
            name = (output["id"], index)
            wanted[output["llm"] - 1].add(name)
            layers = logs[output["llm"] - 1][name]
            assert layers.keys() == {0, 2}
            for ids in layers.values():
                assert len(ids) == len(tokens) - 1
                assert None not in ids
    assert [set(one) for one in logs] == wanted, "nothing else is in the log"


FAILS = """
llm = make(sys.argv[1])
show(llm.generate("Leo reads", SamplingParams(max_tokens=9), use_tqdm=False), llm=1)
raise KeyError("the script's own")
"""


def test_a_script_that_fails_leaves_a_whole_log(tmp_path: Path) -> None:
    log = tmp_path / "routes.jsonl"
    done = run_script(FAILS, bundled_model.path(), VLLM_LOG_MOE=str(log), VLLM_LOG_MOE_LAYER="0,2")
    assert done.returncode == 1
    assert "the script's own" in done.stderr
    (output,) = outputs_of(done)
    (logged,) = logs_of(log)
    assert len(logged[output["id"], 0][0]) == len(output["choices"][0]) - 1


REFUSED = """
from moescope_service.errors import RefusedError
try:
    make(sys.argv[1])
except RefusedError as error:
    print("REFUSED", error)
"""


def test_a_dense_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    done = run_script(REFUSED, dense_model(tmp_path), MOESCOPE_ENABLE="1")
    assert "is a dense model: it has no experts to record" in done.stdout, done.stderr


@pytest.mark.parametrize("processes", ["0", "1"])
def test_what_the_worker_refuses_reaches_the_script(tmp_path: Path, processes: str) -> None:
    done = run_script(
        REFUSED,
        bundled_model.path(),
        VLLM_LOG_MOE=str(tmp_path / "routes.jsonl"),
        VLLM_LOG_MOE_LAYER="7",
        VLLM_ENABLE_V1_MULTIPROCESSING=processes,
    )
    assert "REFUSED" in done.stdout, done.stderr
    assert "names layer 7, which routes nothing" in done.stdout
    assert done.returncode == 0, done.stderr


def test_not_enabled_there_are_no_routes() -> None:
    code = """
from moescope_service import offline
try:
    offline.routes(make(sys.argv[1]), [])
except RuntimeError as error:
    print("REFUSED", error)
"""
    done = run_script(code, bundled_model.path())
    assert "REFUSED no routes of this LLM are captured: set MOESCOPE_ENABLE=1" in done.stdout


def test_a_model_that_calls_its_kernels_itself_is_refused(tmp_path: Path) -> None:
    """MiniCPM with experts; its weights do not matter, so vLLM makes them up."""
    config = json.loads((bundled_model.path() / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id")
    config = {
        **{name: config[name] for name in kept if name in config},
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "scale_emb": 1.0,
        "scale_depth": 1.0,
        "dim_model_base": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = REFUSED.replace(
        "sys.argv[1]", "sys.argv[1], skip_tokenizer_init=True, load_format='dummy'"
    )
    done = run_script(code, tmp_path, MOESCOPE_ENABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert "MiniCPMForCausalLM has no mixture-of-experts layer that vLLM routes" in done.stdout, (
        done.stdout + done.stderr
    )

"""Weights that are reloaded between two requests and in mid-request: right to the row.

The other checkpoint has other routers and the same of everything else. So the input of the first
layer's router is the same for both, whatever stands in the KV cache: its experts say which weights
computed a row.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moescope_service import bundled_model

from .test_offline import run_script

WORK = """
import os
import numpy as np
from moescope_service import offline

OTHER = os.environ["OTHER_CHECKPOINT"]
llm = make(sys.argv[1])
engine, numbers = llm.llm_engine, iter(range(100))
prompt = "Leo reads 9 pages a day for 4 days. How many pages does Leo read in all? " * 3

def reload(path):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

def run(prompt, max_tokens, in_mid_request=lambda: None):
    name = f"request-{next(numbers)}"
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(name, prompt, params)
    finished = []
    for step in range(10**6):
        finished += [one for one in engine.step() if one.finished]
        if finished:
            break
        if step == 7:
            in_mid_request()
    (found,) = offline.routes(llm, finished)
    return [*finished[0].prompt_token_ids, *finished[0].outputs[0].token_ids], found[0]

traces = {}
traces["first"] = run(prompt, 12)
reload(OTHER)
traces["hit"] = run(prompt, 12)  # its prompt is in the prefix cache
traces["updated"] = run(prompt[:100], 40, lambda: reload(sys.argv[1]))
traces["last"] = run(prompt, 3)
for name, (tokens, trace) in traces.items():
    assert trace.complete
    truth = []
    for path in (sys.argv[1], OTHER):
        reload(path)
        llm.reset_prefix_cache()
        _, one = run({"prompt_token_ids": tokens}, 1)
        assert not (one.source == 1).any()
        truth.append(np.sort(one.topk_ids[: len(tokens) - 1, 0]))
    ids = np.sort(trace.topk_ids[:, 0])
    is_of = [(ids == one).all(-1).tolist() for one in truth]
    print("TRACE", json.dumps({
        "name": name, "versions": trace.weights_versions.tolist(), "is_of": is_of,
        "by_row": trace.weights_version.tolist(), "cached": int((trace.source == 1).sum()),
    }), flush=True)
"""


@pytest.mark.parametrize("processes", ["0", "1"])
def test_every_row_has_the_number_of_the_weights_that_computed_it(
    tmp_path: Path, processes: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundled_model.path(), other)
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: -t if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}, file)
    done = run_script(
        WORK,
        bundled_model.path(),
        VLLM_ENABLE_V1_MULTIPROCESSING=processes,
        MOESCOPE_ENABLE="1",
        OTHER_CHECKPOINT=str(other),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("TRACE")]
    found = {one.pop("name"): one for one in lines}
    assert found["first"]["versions"] == [[0, 0]]
    cached = found["hit"]["cached"]
    assert cached > 32
    assert found["hit"]["versions"] == [[0, 0], [cached, 1]]
    assert [number for _, number in found["updated"]["versions"]][-2:] == [1, 2]
    assert len(found["last"]["versions"]) > 1
    for one in found.values():
        for row, number in enumerate(one["by_row"]):
            # Even numbers are of the first checkpoint, odd ones of the other.
            assert one["is_of"][number % 2][row], (row, number)
            assert not one["is_of"][1 - number % 2][row], (row, number)

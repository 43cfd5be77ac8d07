"""Runs models with ``vllm.LLM``, one after the other in one process, and writes their traces.

``python -m tests.fidelity.run_offline JOBS.json``; a job has the checkpoint ``model``, ``options``
of ``vllm.LLM`` and the file ``out`` for the traces, beside which ``out.error`` stands where vLLM
failed.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import vllm
from vllm.model_executor.models import registry

from moescope import formats
from moescope_service import offline
from tests.fidelity.schemes import VOCAB_SIZE

MAX_STEP_TOKENS = 64
"""Longer prompts are cut into chunks."""
BLOCK_SIZE = 32


def prompts() -> list[dict[str, list[int]]]:
    """Return prompts of 3 to 180 tokens, most of them with the start of another one."""
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 400).tolist()
    own = [tokens[start : start + length] for start, length in ((0, 180), (200, 70), (300, 3))]
    shared = [tokens[:100] + tokens[start : start + 20] for start in (210, 240, 270)]
    return [{"prompt_token_ids": ids} for ids in (*own, *shared)]


def run(model: str, options: dict[str, Any]) -> bytes:
    """Return the traces of a model, as ``.npz``: the prompts at once, then all of them again."""
    llm = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=64 * 2**20,
        seed=0,
        **{"dtype": "float32", **options},
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs: list[Any] = []
    for _ in range(2):
        outputs += llm.generate(prompts(), params, use_tqdm=False)
    traces = [trace for found in offline.routes(llm, outputs) for trace in found]
    assert len(traces) == len(outputs)
    return formats.dump_npz(traces)


def main() -> None:
    """Run the jobs of a file."""
    # Each model is looked at in a process of its own for the sake of CUDA: 20 s without a cache.
    registry._run_in_subprocess = lambda function: function()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        try:
            out.write_bytes(run(job["model"], job["options"]))
        except Exception:  # noqa: BLE001 - the others are to run
            out.with_suffix(".error").write_text(traceback.format_exc())
        gc.collect()


if __name__ == "__main__":
    main()

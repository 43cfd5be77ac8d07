"""One engine over two nodes: two real servers, whose workers are stages of one pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import nodes
from moescope_service import bundled_model

# Compiled, since vLLM 0.32.0 does not run pipeline stages on the CPU with ``--enforce-eager``.
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "8")


def test_a_link_that_is_cut_for_5_s_costs_rows_with_their_cause_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = str(bundled_model.path())
    with nodes.serve_nodes(model, "pp2", FLAGS, tmp_path, gpus=False) as running:
        seen = nodes.measure(running, model)
    assert seen["problems"] == []
    assert (seen["before"]["complete"], seen["after"]["complete"]) == (nodes.NUM_REQUESTS,) * 2
    assert seen["meanwhile"]["incomplete"]

"""A vLLM plugin of these measurements: keeps router logits beside the captured routing.

It is found by a ``dist-info`` directory that `install` writes, and wraps moescope's CUDA sink in
the worker: each hooked router also copies its logits to a static buffer (a kernel that CUDA graphs
replay, like any other), and after a step the logits of some rows are saved with the request ids
and positions they belong to. So weights can be computed again from what the router was given.

It can also make the gates of random weights sharper, with or without moescope: those of
``--load-format dummy`` are so small that all experts are equally probable to five digits. And it
lets `benchmarks.gpu.one_server` take the capture off, and `benchmarks.gpu.timeline` profile it.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import vllm_plugin

DIRECTORY = "TAP_DIR"
MAX_ROWS = "TAP_ROWS"
GATE_SCALE = "TAP_GATE_SCALE"
STATE = "TAP_CAPTURE_STATE"
TIMELINE = "TAP_TIMELINE"
ROWS_A_STEP = 400


def install(directory: Path) -> None:
    """Write the metadata by which vLLM finds the plugin; put ``directory`` on ``PYTHONPATH``."""
    vllm_plugin.install(directory, "moescope_tap", "benchmarks.gpu.tap:register")


def environment(directory: Path, *, gate_scale: float | None = None) -> dict[str, str]:
    """Return the variables of a server with the plugin.

    Args:
        directory: Where `install` wrote the metadata.
        gate_scale: What to multiply the gates' weights by.
    """
    scale = {} if gate_scale is None else {GATE_SCALE: str(gate_scale)}
    return vllm_plugin.python_path(directory) | scale


def switching(state: Path) -> dict[str, str]:
    """Return the variables of a server with moescope whose capture can be taken off.

    Args:
        state: The file that says how it stands.
    """
    return {STATE: str(state)}


def profiling(directory: Path) -> dict[str, str]:
    """Return the variables of a server with moescope whose steps can be profiled to a directory."""
    return {TIMELINE: str(directory)}


def saving(directory: Path, max_rows: int) -> dict[str, str]:
    """Return the variables of a server with moescope that saves rows to a directory."""
    return {DIRECTORY: str(directory), MAX_ROWS: str(max_rows)}


def register() -> None:
    """Do what the variables say; vLLM calls it in every process."""
    if GATE_SCALE in os.environ:
        _sharpen(float(os.environ[GATE_SCALE]))
    if DIRECTORY in os.environ:
        _tap_sink()
    if STATE in os.environ:
        from benchmarks.gpu import one_server

        one_server.make_detachable(Path(os.environ[STATE]))
    if TIMELINE in os.environ:
        from benchmarks.gpu import timeline

        timeline.make_profilable(Path(os.environ[TIMELINE]))


def _sharpen(scale: float) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    load_model = Worker.load_model
    if hasattr(load_model, "sharpens"):
        return

    @functools.wraps(load_model)
    def load_and_sharpen(worker: Any, *args: Any, **kwargs: Any) -> None:
        load_model(worker, *args, **kwargs)
        for name, parameter in worker.model_runner.get_model().named_parameters():
            if name.endswith((".mlp.gate.weight", ".mlp.router.weight")):
                parameter.data.mul_(scale)

    setattr(load_and_sharpen, "sharpens", True)  # noqa: B010, to mypy it has no such attribute
    Worker.load_model = load_and_sharpen


def _tap_sink() -> None:
    from moescope_service.capture import layout_v1, layout_v2
    from moescope_service.capture.cuda import sink

    CudaSink: Any = sink.CudaSink  # noqa: N806, it is patched
    if hasattr(CudaSink, "tap"):
        return
    CudaSink.tap = tap = Tap(Path(os.environ[DIRECTORY]), int(os.environ[MAX_ROWS]))
    hook, take = CudaSink.hook, CudaSink.take

    def hook_and_tap(sink: Any, column: int, router: Any) -> None:
        hook(sink, column, router)
        tap.hook(sink, column, router)

    def save_and_take(sink: Any, num_rows: int) -> Any:
        tap.save(num_rows)
        return take(sink, num_rows)

    CudaSink.hook, CudaSink.take = hook_and_tap, save_and_take
    layouts: tuple[Any, ...] = (layout_v1, layout_v2)
    for layout in layouts:
        layout.read_batch = _keeping(tap, layout.read_batch, layout.positions)


def _keeping(tap: Tap, read_batch: Any, positions: Any) -> Any:
    def read_and_keep(runner: Any) -> Any:
        tap.batch, tap.positions = read_batch(runner), positions(runner)
        return tap.batch

    return read_and_keep


class Tap:
    """Static buffers of router logits, and the rows that are saved."""

    def __init__(self, directory: Path, max_rows: int) -> None:
        self.batch: Any = None
        self.positions: Any = None
        self._directory, self._rows_left = directory, max_rows
        self._numbers = itertools.count()
        self._logits: torch.Tensor | None = None

    def hook(self, sink: Any, column: int, router: Any) -> None:
        """Let a hooked router also leave its logits."""
        compute_routing = router._compute_routing
        if self._logits is None:
            num_layers, max_tokens, _ = sink.buffers.topk_ids.shape
            shape = (num_layers, max_tokens, sink.num_experts)
            self._logits = torch.zeros(
                shape, dtype=torch.float32, device=sink.buffers.topk_ids.device
            )
        layer = self._logits[column]

        @functools.wraps(compute_routing)
        def compute_and_tap(hidden_states: Any, router_logits: Any, *args: Any, **kw: Any) -> Any:
            layer[: len(router_logits)].copy_(router_logits)
            return compute_routing(hidden_states, router_logits, *args, **kw)

        router._compute_routing = compute_and_tap

    def save(self, num_rows: int) -> None:
        """Save some rows of the step that was just launched."""
        if self._rows_left <= 0 or self.batch is None or self._logits is None:
            return
        rows = torch.arange(0, num_rows, -(-num_rows // ROWS_A_STEP))[: self._rows_left]
        self._rows_left -= len(rows)
        owner = np.searchsorted(self.batch.first_row, rows.numpy(), side="right") - 1
        on_device = rows.to(self._logits.device)
        np.savez(
            self._directory / f"{next(self._numbers):05d}.npz",
            request_ids=np.array([self.batch.internal_ids[i] for i in owner]),
            positions=self.positions[on_device].cpu().numpy(),
            logits=self._logits[:, on_device].transpose(0, 1).cpu().numpy(),
        )

"""What simulated workers capture, and a clock that passes when told."""

from __future__ import annotations

from typing import Any

from moescope_service.messages import CaptureSpec


def make_spec(**changes: Any) -> CaptureSpec:
    """Return what a small worker captures: 2 of 5 layers, top-2 of 8 experts, 32 blocks of 4.

    Args:
        changes: Fields with other values.
    """
    values: dict[str, Any] = {
        "engine": 0,
        "num_engines": 1,
        "stage": 0,
        "num_stages": 1,
        "layers": [1, 3],
        "num_hidden_layers": 5,
        "num_experts": 8,
        "top_k": 2,
        "id_dtype": "uint8",
        "weights_dtype": "float16",
        "router_types": ["CPURouter"],
        "block_size": 4,
        "num_blocks": 32,
        "trust_prefix_hits": True,
        "model": "tiny",
        "device": "cpu",
        "seed": 0,
        "versions": {"moescope": "0", "vllm": "0.32.0", "torch": "2"},
    }
    return CaptureSpec(**(values | changes))


class Clock:
    """Monotonic seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now_s

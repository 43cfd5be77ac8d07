"""What a decode step reads: a server's answer by batch size, and the picture of it."""

from __future__ import annotations

import httpx
import numpy as np

from benchmarks.gpu import step_experts


def told(*steps: dict) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.url.path, request.url.query) == ("/experts", b"per=step")
        return httpx.Response(200, json={"engines": [{"engine": 0, "steps": steps}]})

    return httpx.Client(base_url="http://s", transport=httpx.MockTransport(answer))


def test_the_decode_steps_of_a_batch_are_picked() -> None:
    def step(kind: str, size: int, distinct: list[float], expert_bytes: float | None) -> dict:
        return {"kind": kind, "min_tokens": size, "steps": 3, "distinct_experts": distinct,
                "expert_bytes": expert_bytes}  # fmt: skip

    steps = (
        step("prefill", 8, [9.0, 9.0], 9e9),
        step("decode", 4, [1.0, 1.0], 1e9),
        step("decode", 8, [5.0, 6.0], 2.5e9),
    )
    with told(*steps) as http:
        assert step_experts.decode_steps(http, 8) == {
            "steps": 3,
            "distinct_experts": 5.5,
            "expert_gb": 2.5,
        }
    with told(step("decode", 1, [2.0], None)) as http:
        assert step_experts.decode_steps(http, 1)["expert_gb"] == 0


def test_the_picture_has_medians_and_what_uniform_routing_reads() -> None:
    def rounds(distinct: float) -> dict:
        return {"distinct_experts": [distinct, distinct + 2, distinct + 1], "step_ms": [3, 1, 2]}

    loads = {load: {"1": rounds(4.0), "2": rounds(6.0)} for load in step_experts.LOADS}
    figure = step_experts.draw({"num_experts": 8, "top_k": 4, "loads": loads})
    experts, times = figure.axes
    *measured, uniform = experts.get_lines()
    for line in measured:
        np.testing.assert_allclose(line.get_xydata(), [[1, 5], [2, 7]])
    np.testing.assert_allclose(uniform.get_ydata(), [4, 6])
    for line in times.get_lines():
        np.testing.assert_allclose(line.get_ydata(), [2, 2])

"""Random traces, and a server in memory for the client's tests."""

from collections.abc import Callable

import httpx
import numpy as np
import orjson

from moescope import formats, version_runs
from moescope.trace import RouteTrace, Source
from moescope.version_runs import LabelSpan


def make_trace(
    seed: int = 0,
    *,
    num_rows: int = 12,
    num_experts: int = 60,
    layers: tuple[int, ...] = (0, 1, 3),
    top_k: int = 4,
    weights: bool = True,
    token_ids: bool = True,
    missing: float = 0.0,
    request_id: str = "chatcmpl-1",
    index: int = 0,
    versions: bool = True,
    tokens: bool = False,
) -> RouteTrace:
    random = np.random.default_rng(seed)
    shape = (num_rows, len(layers))
    ids = np.argsort(random.random((*shape, num_experts)), axis=-1)[..., :top_k]
    gone = random.random(num_rows) < missing
    numbers = np.sort(random.integers(version_runs.MIXED, 3, num_rows))
    return RouteTrace(
        request_id=request_id,
        index=index,
        model="demo",
        num_experts=num_experts,
        num_hidden_layers=8,
        layers=np.array(layers, np.int32),
        topk_ids=ids.astype(formats.id_dtype(num_experts)),
        topk_weights=random.random((*shape, top_k)).astype(np.float16) if weights else None,
        source=np.where(gone, Source.MISSING, random.integers(0, 2, num_rows)).astype(np.uint8),
        weights_versions=version_runs.runs_of(numbers, ~gone, 0)
        if versions
        else version_runs.unknown(),
        weight_labels=labels(num_rows + 1 - min(3, num_rows)) if versions else [],
        token_ids=random.integers(0, 1000, num_rows + 1).astype(np.int32) if token_ids else None,
        tokens=[TEXTS[number % len(TEXTS)] for number in range(num_rows + 1)] if tokens else None,
        prompt_len=min(3, num_rows),
        num_tokens=num_rows + 1,
        cached_len=1,
        finish_reason="stop",
        complete=not gone.any(),
        created_s=1234.5,
        versions={"vllm": "0.32.0"},
    )


TEXTS = ["Tom", ' "', "<script>", "<0xF0><0x9F>", "شكرا", "", "\x00\n", "é🙂"]
"""Of tokens."""


def labels(num_tokens: int) -> list[LabelSpan]:
    """One output token of unlabeled weights, the others of the next ones."""
    return [
        LabelSpan(version="default", start=0, end=1),
        LabelSpan(version="step-1", start=1, end=num_tokens),
    ]


def same(a: RouteTrace, b: RouteTrace) -> bool:
    """Whether two traces are equal, dtypes included."""
    for name in RouteTrace.__dataclass_fields__:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, np.ndarray):
            if one.dtype != other.dtype or not np.array_equal(one, other):
                return False
        elif one != other:
            return False
    return True


INFO = {
    "model": "demo",
    "layers": [0, 1, 3],
    "num_hidden_layers": 8,
    "num_experts": 60,
    "top_k": 4,
    "router_types": ["CPURouter"],
    "id_dtype": "uint8",
    "weights_dtype": "float16",
    "device": "cpu",
    "seed": 0,
    "versions": {"moescope": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0"},
    "capture": "on",
    "routes_default": "on",
    "mode": "routes",
    "routes_sample": 1.0,
    "token_ids": True,
    "store": {"limit_bytes": 100, "bytes": 10, "traces": 1, "evicted": 0},
    "started_s": 1.0,
}


def completion(prompt: str, number: int = 0, tokens: int = 3) -> dict:
    """A chat completion as vLLM gives it."""
    return {
        "id": f"chatcmpl-{number}",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"re: {prompt}"},
                "finish_reason": "length",
                "token_ids": list(range(tokens)),
            }
        ],
        "usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": tokens},
        "prompt_token_ids": [1] * len(prompt.split()),
    }


Handler = Callable[[httpx.Request], httpx.Response]


def server(routes: dict[str, Handler | dict]) -> httpx.MockTransport:
    """A transport that answers by "METHOD /path"; everything else is vLLM's 404."""

    def handle(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode().partition("?")[0]
        answer = routes.get(f"{request.method} {path}")
        if answer is None:
            return httpx.Response(404, json={"detail": "Not Found"})
        return httpx.Response(200, json=answer) if isinstance(answer, dict) else answer(request)

    return httpx.MockTransport(handle)


def lines(data: bytes) -> list[dict]:
    return [orjson.loads(line) for line in data.splitlines()]

"""What a request can ask of the generation, on all of vLLM's endpoints."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from moescope_service import bundled_model
from tests.fidelity.bundled import Tally
from tests.fidelity.situations.served import BLOCK, MODEL, Served, check_tokens, random_prompt

EOS = 2
QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 4. How many has he now?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": ["red", "blue"]}},
            "required": ["color"],
            "additionalProperties": False,
        },
    },
}


@functools.cache
def no_spaces() -> dict[str, int]:
    """Return a bias against white space, of which a model that knows no JSON finds no end."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model.path())
    spaces = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()]
    return {str(token_id): -100 for token_id in spaces}


def test_structured_outputs(default_server: Served) -> None:
    tally = Tally("structured outputs")
    asked = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, "logit_bias": no_spaces()}
    schema = {"name": "paint", "schema": TOOL["function"]["parameters"]}  # type: ignore[index]
    for wish in (
        {"structured_outputs": {"choice": ["seventy-one pears", "blue"]}},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
    ):
        free, bound = (
            default_server.post("/v1/chat/completions", **asked, **body) for body in ({}, wish)
        )
        texts = [one["choices"][0]["message"]["content"] for one in (free, bound)]
        assert texts[0] != texts[1], "the grammar changed nothing"
        if "structured_outputs" in wish:
            assert texts[1] in {"seventy-one pears", "blue"}
        else:
            assert json.loads(texts[1])["color"] in {"red", "blue"}
        for response in (free, bound):
            (trace,) = default_server.routes(response["id"])
            assert trace.num_tokens == response["usage"]["total_tokens"]
            tally.add(trace)
    tally.record()


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(default_server: Served, *, stream: bool) -> None:
    tally = Tally("tool calls, streamed" if stream else "tool calls")
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        created: Any = default_server.openai.chat.completions.create(
            model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice=choice,  # type: ignore[call-overload]
            max_tokens=80, temperature=0, logit_bias=no_spaces(), stream=stream,
        )  # fmt: skip
        if stream:
            chunks = list(created)
            request_id = chunks[0].id
            calls = [call for chunk in chunks for one in chunk.choices
                     for call in one.delta.tool_calls or ()]  # fmt: skip
            name = "".join(call.function.name or "" for call in calls)
            arguments = "".join(call.function.arguments or "" for call in calls)
        else:
            request_id = created.id
            (call,) = created.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
        assert name == "paint"
        assert json.loads(arguments)["color"] in {"red", "blue"}
        tally.add(*default_server.routes(request_id))
    tally.record()


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_streaming(kind: str, default_server: Served, rng: np.random.Generator) -> None:
    tally = Tally(f"streaming, {kind}")
    tokens: list[int] = []
    asked = {"model": MODEL, "max_tokens": 50, "temperature": 1, "stream": True}
    extra = {"return_token_ids": True, "ignore_eos": True}
    client = default_server.openai
    if kind == "chat":
        stream = client.chat.completions.create(messages=QUESTION, extra_body=extra, **asked)  # type: ignore[call-overload]
    else:
        prompt = random_prompt(rng, 100)
        stream = client.completions.create(prompt=prompt, extra_body=extra, **asked)  # type: ignore[call-overload]
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            tokens += getattr(choice, "token_ids", None) or []
    assert len(chunks) > 10
    assert len(tokens) == 50
    (trace,) = default_server.routes(chunks[0].id)
    assert trace.token_ids is not None
    assert trace.token_ids[trace.prompt_len :].tolist() == tokens
    tally.add(trace)
    tally.record()


def test_prompt_logprobs(default_server: Served, rng: np.random.Generator) -> None:
    """vLLM recomputes a cached prompt to have its logprobs: no row may come from the cache."""
    tally = Tally("prompt_logprobs")
    prompt = random_prompt(rng, 3 * BLOCK + 9)
    for asked, cached_len in (({}, 0), ({"prompt_logprobs": 2}, 0), ({}, 3 * BLOCK)):
        response = default_server.complete(prompt, **asked)
        (trace,) = default_server.routes(response["id"])
        check_tokens([trace], response)
        assert trace.cached_len == cached_len
        if asked:
            assert len(response["choices"][0]["prompt_logprobs"]) == len(prompt)
        tally.add(trace)
    tally.record()


def test_stop_strings(default_server: Served) -> None:
    tally = Tally("stop strings")
    asked = {"messages": QUESTION, "temperature": 0, "max_tokens": 60, "return_token_ids": True}
    free = default_server.post("/v1/chat/completions", **asked)
    text = free["choices"][0]["message"]["content"]
    for stop in (text[10:14], text[20:23]):
        response = default_server.post("/v1/chat/completions", stop=[stop], **asked)
        (choice,) = response["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == stop
        assert choice["message"]["content"] == text[: text.index(stop)]
        (trace,) = default_server.routes(response["id"])
        assert trace.token_ids is not None
        output = trace.token_ids[trace.prompt_len :].tolist()
        assert output == choice["token_ids"]
        assert len(output) < len(free["choices"][0]["token_ids"]), "it was not stopped"
        tally.add(trace)
    tally.record()


def test_one_token(default_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("max_tokens = 1")
    for length in (1, 2, BLOCK, BLOCK + 1, 100):
        response = default_server.complete(random_prompt(rng, length), max_tokens=1)
        (trace,) = default_server.routes(response["id"])
        check_tokens([trace], response)
        assert trace.num_rows == length
        tally.add(trace)
    tally.record()


def test_ignore_eos(default_server: Served) -> None:
    tally = Tally("ignore_eos")
    response = default_server.post(
        "/v1/chat/completions", messages=QUESTION, max_tokens=150, temperature=0, ignore_eos=True
    )
    (trace,) = default_server.routes(response["id"])
    assert trace.token_ids is not None
    output = trace.token_ids[trace.prompt_len :].tolist()
    assert len(output) == 150
    assert EOS in output[:-1], "the model never ended its answer"
    tally.add(trace)
    tally.record()


def test_echo(default_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("echo")
    prompt = "Sara has 12 pens and buys " + " and ".join(map(str, rng.integers(100, 900, 20)))
    for max_tokens, logprobs in ((5, None), (5, 1), (0, 1)):
        response = default_server.complete(
            prompt, echo=True, max_tokens=max_tokens, logprobs=logprobs, return_token_ids=False
        )
        plain = default_server.complete(prompt, max_tokens=max(max_tokens, 1))
        (choice,) = response["choices"]
        text = plain["choices"][0]["text"] if max_tokens else ""
        assert choice["text"] == prompt + text
        (trace,) = default_server.routes(response["id"])
        check_tokens(default_server.routes(plain["id"]), plain)
        assert trace.prompt_len == plain["usage"]["prompt_tokens"]
        tally.add(trace)
    tally.record()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Tom has 3 apples.", "max_tokens": 20}),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 20}),
        ("/v1/responses", {"input": "Tom has 3 apples.", "max_output_tokens": 20}),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 20}),
    ],
)
def test_endpoints(path: str, body: dict[str, Any], default_server: Served) -> None:
    tally = Tally(path)
    response = default_server.post(path, **body)
    (trace,) = default_server.routes(response["id"])
    usage = response["usage"]
    inputs, outputs = (
        usage.get(f"{old}_tokens", usage.get(f"{new}_tokens"))
        for old, new in (("prompt", "input"), ("completion", "output"))
    )
    assert (trace.prompt_len, trace.num_tokens) == (inputs, inputs + outputs)
    tally.add(trace)
    tally.record()


def test_async_scheduling(default_server: Served) -> None:
    """With it a step more is under way when a sequence turns out to have ended.

    It is vLLM's default on GPUs; on the CPU vLLM switches it off whatever was asked for (0.32.0,
    ``platforms/cpu.py``).
    """
    is_on = default_server.client.info().device != "cpu"
    tally = Tally(f"async scheduling {'on' if is_on else 'off'}")
    surplus = 0
    for number in range(4):
        question = [{"role": "user", "content": f"Sara has {number} pens and buys 5. How many?"}]
        response = default_server.post(
            "/v1/chat/completions", messages=question, max_tokens=100, temperature=0
        )
        assert response["choices"][0]["finish_reason"] == "stop"
        (trace,) = default_server.routes(response["id"])
        spans = default_server.spans(response["id"])
        surplus += max(span.start + span.rows for span in spans) > trace.num_rows
        tally.add(trace)
    assert bool(surplus) == is_on, f"{surplus} steps were ahead of the sampled tokens"
    tally.record()

"""What is sent: conversations of one turn or more; each turn is a request to the server."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import orjson

from moescope.errors import CommandError

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
"""The paths of OpenAI's API."""

RANDOM_TOKENS = (50, 450)
"""Default range of random token ids, end excluded: ordinary tokens in every vocabulary."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What a user adds to a conversation."""

    content: str | list[int] | list[list[int]]
    """Text; or for ``/v1/completions`` token ids, or those of several prompts in one request."""
    max_tokens: int
    """Output tokens at most, of each prompt."""

    @property
    def num_prompts(self) -> int:
        """How many prompts it has; turns of longer conversations have one each."""
        several = isinstance(self.content, list) and isinstance(next(iter(self.content), 0), list)
        return len(self.content) if several else 1


Conversation = tuple[Turn, ...]
"""Turns that follow one another: each is sent when the response to the one before it has ended."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How every request is sent."""

    model: str
    endpoint: Endpoint = "chat"
    temperature: float | None = 0.0
    """0 is greedy; the server's default where None."""
    seed: int | None = None
    """The sampling seed."""
    ignore_eos: bool = False
    """vLLM's extension: outputs of exactly ``max_tokens`` tokens."""
    token_ids: bool = False
    """vLLM's extension ``return_token_ids``: keep the token ids of outputs."""
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of the body, such as vLLM's ``cache_salt``."""


class Dialogue:
    """A conversation as it goes on: every request holds all turns and responses before it.

    Args:
        conversation: Its turns.
        options: How every request is sent.

    Raises:
        CommandError: Token ids are to go to the chat endpoint.
    """

    def __init__(self, conversation: Conversation, options: RequestOptions) -> None:
        if options.endpoint == "chat" and any(
            isinstance(turn.content, list) for turn in conversation
        ):
            raise CommandError(
                "invalid endpoint 'chat' for prompts of token ids: expected completions"
            )
        self.turns = conversation
        self._options = options
        self._said: Any = None
        self._number = 0
        self._body: bytes | None = None
        self.prepare()

    def prepare(self) -> None:
        """Encode the next request, so that sending it costs no time."""
        turn = self.turns[self._number]
        options = self._options
        body: dict[str, Any] = {
            "model": options.model,
            "max_tokens": turn.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.endpoint == "chat":
            self._said = [*(self._said or ()), {"role": "user", "content": turn.content}]
            body["messages"] = self._said
        else:
            self._said = turn.content if self._said is None else self._said + turn.content
            body["prompt"] = self._said
        optional = {
            "temperature": options.temperature,
            "seed": options.seed,
            "ignore_eos": options.ignore_eos or None,
            "return_token_ids": options.token_ids or self.needs_token_ids or None,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        self._body = orjson.dumps(body | options.extra_body)

    @property
    def body(self) -> bytes:
        """The next request's body, as JSON."""
        if self._body is None:
            raise ValueError("the response to the turn before is not known yet")
        return self._body

    @property
    def needs_token_ids(self) -> bool:
        """Whether the conversation cannot go on without the token ids of its outputs."""
        return len(self.turns) > 1 and isinstance(self.turns[0].content, list)

    def add_response(self, text: str, token_ids: list[int] | None) -> bool:
        """Add a response to the conversation and prepare the next turn.

        Returns:
            Whether there is a next turn.
        """
        self._number += 1
        self._body = None
        if self._number == len(self.turns):
            return False
        if self._options.endpoint == "chat":
            self._said = [*self._said, {"role": "assistant", "content": text}]
        else:
            self._said = self._said + (token_ids if isinstance(self._said, list) else text)
        self.prepare()
        return True


def from_texts(
    texts: Sequence[str], *, num_conversations: int, turns: int, max_tokens: int
) -> list[Conversation]:
    """Make conversations of texts in their order; when they run out, start from the first again."""
    endless = itertools.cycle(texts)
    return [
        tuple(Turn(next(endless), max_tokens) for _ in range(turns))
        for _ in range(num_conversations)
    ]


def random_tokens(
    *,
    num_conversations: int,
    turns: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    token_range: tuple[int, int] = RANDOM_TOKENS,
    seed: int = 0,
) -> list[Conversation]:
    """Make conversations of random token ids.

    Args:
        num_conversations: How many.
        turns: Turns of each.
        input_len: Tokens that each turn adds, without the prefix.
        output_len: Output tokens of each turn.
        range_ratio: Lengths are uniform within this part below and above those given.
        prefix_len: Tokens that all conversations start with alike.
        token_range: The ids' range, end excluded.
        seed: The same seed gives the same conversations.
    """
    generator = np.random.default_rng(seed)
    prefix = generator.integers(*token_range, prefix_len).tolist()

    def length(mean: int) -> int:
        low, high = int(mean * (1 - range_ratio)), int(mean * (1 + range_ratio))
        return max(1, int(generator.integers(low, high, endpoint=True)))

    def turn(start: list[int]) -> Turn:
        ids = generator.integers(*token_range, length(input_len)).tolist()
        return Turn(start + ids, length(output_len))

    return [
        tuple(turn(prefix if number == 0 else []) for number in range(turns))
        for _ in range(num_conversations)
    ]


def num_requests(conversations: Iterable[Conversation]) -> int:
    """Return how many requests the conversations are."""
    return sum(map(len, conversations))

"""The routing of one sequence: which experts, with which weights, in which layer."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from moescope import received, version_runs
from moescope.analysis import balance
from moescope.errors import LayerNotCapturedError
from moescope.received import MAX_EXPERTS, MAX_LAYERS, MAX_TOKENS, MAX_TOP_K
from moescope.version_runs import LabelSpan

if TYPE_CHECKING:  # none of them is needed by who makes no table
    import pandas as pd
    import polars as pl
    import pyarrow as pa


class Source(enum.IntEnum):
    """Where a row of a trace comes from. ``source`` alone says that a row is missing."""

    COMPUTED = 0
    """The router computed it for this sequence."""
    CACHED = 1
    """Computed when the KV block that a prefix-cache hit reused was filled."""
    MISSING = 2
    """Not captured; the expert ids and weights of the row mean nothing."""
    RECALLED = 3
    """Computed for the same prefix in another KV block, which left the cache before a KV connector
    brought its entries back."""


def _check_dtype(name: str, array: npt.NDArray[Any] | None, *dtypes: type[np.generic]) -> None:
    if array is not None and array.dtype not in dtypes:
        wanted = " or ".join(dtype.__name__ for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {array.dtype}")


def _check_range(name: str, array: npt.NDArray[Any], end: int) -> None:
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < end:
        raise ValueError(
            f"{name} must be 0 to {end - 1}, got {int(array.min())} to {int(array.max())}"
        )


def _require(package: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"to_{package} needs {package}: pip install {package}") from error


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RouteTrace:
    """The routing of one sequence (one choice of one request).

    Row ``i`` is the routing of the token at position ``i``, prompt first. A finished sequence has
    ``num_tokens - 1`` rows: its last sampled token is never routed. Expert ids are logical (before
    any expert-parallel load balancing), layers are the model's own layer numbers.

    A page of a trace has some of its rows, from position ``start`` on, and their tokens; everything
    else is that of the whole trace. `Client` joins the pages that it fetches.
    """

    request_id: str
    """An id of the request as its client saw it, such as ``chatcmpl-…``."""
    index: int
    """The choice's index in the response: prompt number x n + sample number."""
    model: str
    """The served model's name."""
    lora: str | None = None
    """The name of the LoRA adapter, if any."""
    num_experts: int
    """Routed experts a layer."""
    num_hidden_layers: int
    """Layers of the model, those without experts included."""
    layers: npt.NDArray[np.int32]
    """Global layer numbers, ``[num_layers]``."""
    start: int = 0
    """Position of the first row; above 0 in a page of a trace."""
    topk_ids: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    """Expert ids, ``[num_rows, num_layers, top_k]``, in the router's order."""
    topk_weights: npt.NDArray[np.float16] | npt.NDArray[np.float32] | None
    """The weights the router returned, ``[num_rows, num_layers, top_k]``; None if left out."""
    source: npt.NDArray[np.uint8]
    """A `Source` for every row, ``[num_rows]``."""
    weights_versions: npt.NDArray[np.int64] = dataclasses.field(
        default_factory=version_runs.unknown
    )
    """Which weights computed the rows, ``[num_runs, 2]``: see `moescope.version_runs`. Empty
    where the server does not tell."""
    weight_labels: list[LabelSpan] = dataclasses.field(default_factory=list)
    """Which weights sampled the output tokens, by the label that vLLM had for them (its
    ``weight_versions``). Empty where nobody labeled them, or vLLM does not tell."""
    token_ids: npt.NDArray[np.int32] | None
    """Prompt and output tokens, ``[num_tokens]``; a page has those of its rows, and the last page
    the last token too, which was never routed. None where the server keeps them out."""
    tokens: list[str] | None = None
    """The text of each of `token_ids`, where it was asked for. A token that is no whole UTF-8 by
    itself, such as a part of an emoji, shows its bytes: ``<0xF0><0x9F>``."""
    prompt_len: int
    """Prompt tokens."""
    num_tokens: int
    """Prompt and output tokens."""
    cached_len: int
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    finish_reason: str | None
    """``stop``, ``length``, ``abort`` … as the engine gave it."""
    complete: bool
    """Every expected sender reported the end, nothing was lost on the way, no row is missing."""
    created_s: float
    """Unix time at which the request was registered, in seconds."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of moescope, vLLM and torch on the server."""

    def __post_init__(self) -> None:
        """Check that the arrays fit each other, and the numbers the arrays.

        What is in the arrays is not looked at: a collector makes a trace of every sequence that
        ends. `check_values` does, for traces that come from elsewhere.

        Raises:
            ValueError: An array's shape does not fit the others, or a number is out of range.
        """
        if self.topk_ids.ndim != 3 or self.topk_ids.shape[1] != len(self.layers):
            raise ValueError(
                f"topk_ids must be [num_rows, {len(self.layers)}, top_k], "
                f"got shape {self.topk_ids.shape}"
            )
        if self.topk_weights is not None and self.topk_weights.shape != self.topk_ids.shape:
            raise ValueError(
                f"topk_weights has shape {self.topk_weights.shape}, "
                f"topk_ids {self.topk_ids.shape}: they must be equal"
            )
        if self.source.shape != (self.num_rows,):
            raise ValueError(f"source must be [{self.num_rows}], got shape {self.source.shape}")
        if self.weights_versions.ndim != 2 or self.weights_versions.shape[1] != 2:
            raise ValueError(
                f"weights_versions must be [num_runs, 2], got shape {self.weights_versions.shape}"
            )
        self._check_numbers()
        num_tokens = len(self._tokens_of(self.start, self.num_rows))
        if self.token_ids is not None and self.token_ids.shape != (num_tokens,):
            raise ValueError(f"token_ids must be [{num_tokens}], got shape {self.token_ids.shape}")
        if self.tokens is not None and (self.token_ids is None or len(self.tokens) != num_tokens):
            raise ValueError(
                f"tokens must be [{num_tokens}], beside token_ids, got {len(self.tokens)}"
            )

    def _check_numbers(self) -> None:
        if not 0 <= self.prompt_len <= self.num_tokens <= MAX_TOKENS:
            raise ValueError(
                f"prompt_len and num_tokens must be 0 <= prompt_len <= num_tokens <= {MAX_TOKENS}, "
                f"got {self.prompt_len} and {self.num_tokens}"
            )
        if not (0 <= self.start <= MAX_TOKENS and self.index >= 0 and self.cached_len >= 0):
            raise ValueError(
                f"start, index and cached_len must not be negative (start not above {MAX_TOKENS}), "
                f"got {self.start}, {self.index} and {self.cached_len}"
            )
        if self.num_rows and self.start + self.num_rows >= self.num_tokens:
            raise ValueError(
                f"a sequence of {self.num_tokens} tokens has {max(self.num_tokens - 1, 0)} rows, "
                f"got {self.num_rows} from row {self.start} on"
            )
        if not (0 <= self.num_experts <= MAX_EXPERTS and 0 <= self.num_hidden_layers <= MAX_LAYERS):
            raise ValueError(
                f"a model has at most {MAX_EXPERTS} experts a layer and {MAX_LAYERS} layers, "
                f"got {self.num_experts} and {self.num_hidden_layers}"
            )

    def check_values(self) -> Self:
        """Check every value and type of a trace that comes from elsewhere; return the trace.

        Takes about a millisecond for 10 MB.

        Raises:
            TypeError: A value or an array has another type.
            ValueError: A value is out of range.
        """
        fields = {name: getattr(self, name) for name in self.__slots__}
        received.check_fields(RouteTrace, fields)
        _check_dtype("layers", self.layers, np.int32)
        _check_dtype("topk_ids", self.topk_ids, np.uint8, np.uint16)
        _check_dtype("topk_weights", self.topk_weights, np.float16, np.float32)
        _check_dtype("source", self.source, np.uint8)
        _check_dtype("weights_versions", self.weights_versions, np.int64)
        _check_dtype("token_ids", self.token_ids, np.int32)
        if self.top_k > MAX_TOP_K:
            raise ValueError(f"topk_ids has {self.top_k} experts a row: more than {MAX_TOP_K}")
        _check_range("layers", self.layers, self.num_hidden_layers)
        _check_range("source", self.source, len(Source))
        version_runs.check(self.weights_versions, self.start, self.num_rows)
        version_runs.check_labels(self.weight_labels, self.num_tokens - self.prompt_len)
        if self.complete and not self.present.all():
            raise ValueError("the trace is complete, and rows are missing")
        if self.topk_ids.size and int(self.topk_ids.max()) >= self.num_experts:
            _check_range("topk_ids", self.topk_ids[self.present], self.num_experts)
        return self

    def _tokens_of(self, start: int, num_rows: int) -> range:
        """Return the positions of some rows' tokens; the last token goes with the last row."""
        end = start + num_rows
        return range(start, self.num_tokens if end >= self.num_tokens - 1 else end)

    @property
    def num_rows(self) -> int:
        """Rows that are here: ``num_tokens - 1``, or those of a page."""
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """Captured layers."""
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts a token and layer."""
        return int(self.topk_ids.shape[2])

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which rows are not missing, ``[num_rows]``."""
        present: npt.NDArray[np.bool_] = self.source != Source.MISSING
        return present

    @property
    def weights_version(self) -> npt.NDArray[np.int64] | None:
        """The number of the weights of each row, ``[num_rows]``; None where it is unknown.

        `moescope.version_runs` says what the numbers mean, and that of a missing row.
        """
        if self.num_rows and not len(self.weights_versions):
            return None
        return version_runs.by_row(self.weights_versions, self.start, self.num_rows)

    @property
    def coverage(self) -> float:
        """Share of rows that are not missing, in [0, 1]; 1.0 for a trace without rows."""
        return float(self.present.mean()) if self.num_rows else 1.0

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays, labels and tokens, one a character of these."""
        arrays = (self.layers, self.topk_ids, self.topk_weights, self.source, self.token_ids)
        size = sum(array.nbytes for array in arrays if array is not None)
        size += version_runs.labels_bytes(self.weight_labels)
        size += sum(map(len, self.tokens or ()))
        return size + self.weights_versions.nbytes

    def counts(self) -> npt.NDArray[np.int64]:
        """Count how often each expert was selected in the rows that are not missing.

        Returns:
            Selections, ``[num_layers, num_experts]``.
        """
        ids = self.topk_ids[self.present].astype(np.int64)
        offsets = np.arange(self.num_layers)[None, :, None] * self.num_experts
        flat = np.bincount((ids + offsets).ravel(), minlength=self.num_layers * self.num_experts)
        return flat.reshape(self.num_layers, self.num_experts)

    def entropy_bits(self) -> npt.NDArray[np.float64]:
        """Return the Shannon entropy of the selections in bits, ``[num_layers]``.

        It is at most ``log2(num_experts)``. The functions of `moescope.analysis` say more about
        ``counts()``.
        """
        return balance.entropy_bits(self.counts())

    def entropy(self) -> npt.NDArray[np.float64]:
        """Return `entropy_bits` in nats, ``[num_layers]``."""
        return balance.entropy(self.counts())

    def top_experts(self, k: int = 3) -> dict[int, list[tuple[int, int, float]]]:
        """Return the k busiest experts of each layer.

        Returns:
            For each layer number (expert, selections, share), busiest first.
        """
        return {
            layer: balance.top_experts(counts, k)
            for layer, counts in zip(self.layers.tolist(), self.counts(), strict=True)
        }

    def to_arrow(self, *, long: bool = False, missing: bool = False) -> pa.Table:
        """Return the trace as an Arrow table; `moescope.arrow` has the columns of both forms.

        Args:
            long: One row a selection (a token, a layer and a rank): the long form. By default one
                row a token, with lists of experts: the wide form.
            missing: Whether the long form has missing rows, with null experts and weights. The wide
                form has every token.

        Raises:
            ImportError: pyarrow is not installed; the message says how to install it.
        """
        arrow = importlib.import_module("moescope.arrow")  # which knows traces itself
        if long:
            return arrow.to_long_table([self], missing=missing)
        return arrow.to_table([self])

    def to_pandas(self, *, long: bool = False, missing: bool = False) -> pd.DataFrame:
        """Return `to_arrow`, which takes the same, as pandas reads it from Parquet.

        Raises:
            ImportError: pandas or pyarrow is not installed; the message says how to install it.
        """
        _require("pandas")
        return self.to_arrow(long=long, missing=missing).to_pandas()

    def to_polars(self, *, long: bool = False, missing: bool = False) -> pl.DataFrame:
        """Return `to_arrow`, which takes the same, as polars reads it from Parquet.

        Raises:
            ImportError: polars or pyarrow is not installed; the message says how to install it.
        """
        polars = _require("polars")
        return polars.from_arrow(self.to_arrow(long=long, missing=missing))

    def page(self, start: int, limit: int) -> RouteTrace:
        """Return some rows, with their tokens; the arrays are views.

        Args:
            start: Position of the first one; not below the trace's own.
            limit: How many at most.
        """
        first = min(start - self.start, self.num_rows)
        last = min(first + limit, self.num_rows)
        tokens = self._tokens_of(start, last - first)
        skipped = slice(tokens.start - self.start, tokens.stop - self.start)
        return dataclasses.replace(
            self,
            start=start,
            topk_ids=self.topk_ids[first:last],
            topk_weights=None if self.topk_weights is None else self.topk_weights[first:last],
            source=self.source[first:last],
            weights_versions=version_runs.cut(
                self.weights_versions, self.start + first, self.start + last
            ),
            token_ids=None if self.token_ids is None else self.token_ids[skipped],
            tokens=None if self.tokens is None else self.tokens[skipped],
        )

    @staticmethod
    def joined(pages: Sequence[RouteTrace]) -> RouteTrace:
        """Return the trace, or the longer page, that consists of pages.

        Of pages that came while the sequence ran, rows behind its end are left out, and what the
        last page says holds.

        Args:
            pages: At least one, each beginning where the one before it ends.

        Raises:
            ValueError: A page is missing, or of another trace.
        """
        first, end = pages[0], pages[0].start
        for page in pages:
            if page.start != end or page.key != first.key:
                raise ValueError(
                    f"expected a page of {first.key} from row {end} on, got {page.key} from row "
                    f"{page.start} on"
                )
            end += page.num_rows
        if len(pages) == 1:
            return first
        last = pages[-1]
        pages = [page.page(page.start, max(last.num_tokens - 1 - page.start, 0)) for page in pages]
        weights: list[Any] = [p.topk_weights for p in pages if p.topk_weights is not None]
        token_ids = [page.token_ids for page in pages if page.token_ids is not None]
        tokens = [page.tokens for page in pages if page.tokens is not None]
        return dataclasses.replace(
            last,
            start=first.start,
            topk_ids=np.concatenate([page.topk_ids for page in pages]),
            topk_weights=np.concatenate(weights) if weights else None,
            source=np.concatenate([page.source for page in pages]),
            weights_versions=version_runs.joined(
                [page.weights_versions for page in pages], first.start
            ),
            token_ids=np.concatenate(token_ids) if len(token_ids) == len(pages) else None,
            tokens=[*itertools.chain(*tokens)] if len(tokens) == len(pages) else None,
            complete=last.complete and all(bool(page.present.all()) for page in pages),
        )

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells the sequence from all others: request id, time of registration, index."""
        return self.request_id, self.created_s, self.index

    def select(self, *, layers: Sequence[int] | None = None, weights: bool = True) -> RouteTrace:
        """Keep some layers only, or leave the weights out.

        Args:
            layers: Global layer numbers to keep, in this order; all where None.
            weights: Whether to keep ``topk_weights``.

        Raises:
            LayerNotCapturedError: A layer is not part of the trace.
        """
        changes: dict[str, Any] = {}
        if layers is not None:
            captured = self.layers.tolist()
            unknown = [layer for layer in layers if layer not in captured]
            if unknown:
                raise LayerNotCapturedError(unknown, captured)
            columns = [captured.index(layer) for layer in layers]
            changes["layers"] = self.layers[columns]
            changes["topk_ids"] = self.topk_ids[:, columns]
            if self.topk_weights is not None:
                changes["topk_weights"] = self.topk_weights[:, columns]
        if not weights:
            changes["topk_weights"] = None
        return dataclasses.replace(self, **changes)

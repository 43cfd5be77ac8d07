"""Questions to replay: the bundled sample, and GSM8K's test split."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import orjson

from moescope.errors import DatasetError

NAMES = ("gsm8k", "prose", "sample")
"""The data sets, by the names that `load` takes."""

_HUB_REPOSITORY = "openai/gsm8k"
_HUB_FILE = "main/test-00000-of-00001.parquet"


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A word problem and its answer, or a text and how it goes on."""

    question: str
    answer: str


def load(name: str, path: Path | None = None) -> list[Question]:
    """Load a data set by name.

    Args:
        name: One of `NAMES`.
        path: A JSON Lines file to read instead of the Hugging Face hub; gsm8k only.

    Raises:
        DatasetError: No such data set, or it cannot be read.
    """
    if name == "gsm8k":
        return read_jsonl(path) if path else gsm8k_from_hub()
    if name not in NAMES:
        raise DatasetError(
            f"invalid data set {name!r}: expected {', '.join(NAMES[:-1])} or {NAMES[-1]}"
        )
    if path is not None:
        raise DatasetError(
            f"invalid --file '{path}': expected none, since the data set {name} is bundled"
        )
    return prose() if name == "prose" else sample()


def sample() -> list[Question]:
    """Load the bundled questions: arithmetic word problems of the bundled model's kind."""
    return _bundled("sample")


def prose() -> list[Question]:
    """Load the bundled passages of plain English prose on everyday things.

    A question is a passage without its last sentence, which is the answer.
    """
    return _bundled("prose")


def _bundled(name: str) -> list[Question]:
    file = importlib.resources.files("moescope") / "data" / f"{name}.jsonl"
    return _parse(file.read_bytes(), f"the bundled {name}")


def read_jsonl(path: Path) -> list[Question]:
    """Read questions from a file with one ``{"question": …, "answer": …}`` a line.

    Raises:
        DatasetError: The file cannot be read, or a line holds something else.
    """
    try:
        return _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error


def gsm8k_from_hub() -> list[Question]:
    """Load GSM8K's test split (1,319 problems) from the Hugging Face hub, or from its cache.

    Raises:
        DatasetError: The optional packages are missing, or the hub cannot be reached.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DatasetError(
            f"reading GSM8K from the Hugging Face hub needs {error.name}: pip install "
            "huggingface-hub pyarrow; or give a local file with --file test.jsonl"
        ) from error
    try:
        path = hub.hf_hub_download(_HUB_REPOSITORY, _HUB_FILE, repo_type="dataset")
    except (OSError, httpx.HTTPError) as error:
        raise DatasetError(
            f"cannot fetch {_HUB_REPOSITORY} from the Hugging Face hub "
            f"({type(error).__name__}); give a local file with --file test.jsonl"
        ) from error
    records = parquet.read_table(path, columns=["question", "answer"]).to_pylist()
    return _questions(records, _HUB_REPOSITORY)


def _parse(data: bytes, where: str) -> list[Question]:
    records = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                records.append(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                raise DatasetError(f"{where}, line {number}: not JSON ({error})") from error
    return _questions(records, where)


def _questions(records: Iterable[Any], where: str) -> list[Question]:
    questions = []
    for number, record in enumerate(records, start=1):
        try:
            question = Question(record["question"], record["answer"])
        except (TypeError, KeyError) as error:
            raise DatasetError(
                f"{where}, record {number}: expected an object with question and answer"
            ) from error
        if not isinstance(question.question, str) or not question.question.strip():
            raise DatasetError(f"{where}, record {number}: expected a question that is text")
        questions.append(question)
    if not questions:
        raise DatasetError(f"{where} holds no question")
    return questions

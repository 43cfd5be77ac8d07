import sys

import pytest

from moescope import DatasetError, datasets


def test_the_sample_holds_100_different_questions_with_answers():
    questions = datasets.sample()
    assert len({item.question for item in questions}) == 100
    assert all(item.answer.strip() for item in questions)


def test_prose_holds_100_different_passages_without_their_last_sentence():
    passages = datasets.load("prose")
    assert len({item.question for item in passages}) == 100
    assert all(item.question.endswith(".") and item.answer.endswith(".") for item in passages)
    assert {item.question for item in passages}.isdisjoint(
        {item.question for item in datasets.sample()}
    )


def test_gsm8k_from_a_file(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(
        '{"question": "1\u2028+1?", "answer": "#### 2"}\n\n{"question": "b", "answer": "c"}\n'
    )
    first, second = datasets.load("gsm8k", path)
    assert first == datasets.Question("1\u2028+1?", "#### 2")
    assert second.question == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ('{"question": "a", "answer": "b"}\nnonsense\n', "line 2: not JSON"),
        ('{"question": "a"}\n', "record 1"),
        ('["a", "b"]\n', "record 1"),
        ('{"question": " ", "answer": "b"}\n', "expected a question"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "test.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        datasets.load("gsm8k", path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.jsonl"):
        datasets.load("gsm8k", tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("package", ["huggingface_hub", "pyarrow"])
def test_without_the_optional_packages_the_message_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "huggingface_hub", sys)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(DatasetError, match=f"needs {package}.*pip install.*--file"):
        datasets.load("gsm8k")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(DatasetError, match=r"'mmlu'.*gsm8k, prose or sample"):
        datasets.load("mmlu")
    with pytest.raises(DatasetError, match="bundled"):
        datasets.load("sample", tmp_path)
    with pytest.raises(DatasetError, match="prose is bundled"):
        datasets.load("prose", tmp_path)

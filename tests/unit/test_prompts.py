import numpy as np
import pytest

from moescope import DatasetError, prompts


def test_reading_gives_back_what_was_written(tmp_path):
    path = tmp_path / "prompts.txt"
    random = np.random.default_rng(0)
    for _ in range(200):
        alphabet = list("ab \\nr\n\r\t\u2028\x85\x0bä…")
        texts = ["x" + "".join(random.choice(alphabet, random.integers(0, 12))) for _ in range(4)]
        prompts.write(path, texts)
        assert prompts.read(path) == texts
        assert path.read_bytes().count(b"\n") == 4


def test_a_file_written_by_hand(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"What is 1+1?\r\n\n  \nfirst\\nsecond\nC:\\dir \\\\n")
    assert prompts.read(path) == ["What is 1+1?", "first\nsecond", "C:\\dir \\n"]
    path.write_bytes(b"\xef\xbb\xbfWhat is 1+1?\r\n")  # as some editors mark UTF-8
    assert prompts.read(path) == ["What is 1+1?"]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_prompts_is_refused(tmp_path, data):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"prompts\.txt"):
        prompts.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.txt"):
        prompts.read(tmp_path / "nowhere.txt")


def test_a_blank_prompt_is_not_written(tmp_path):
    with pytest.raises(DatasetError, match="prompt 2 is blank"):
        prompts.write(tmp_path / "prompts.txt", ["a", " \n"])
    assert not (tmp_path / "prompts.txt").exists()

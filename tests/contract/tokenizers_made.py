"""Small tokenizers of every kind that vLLM serves, as vLLM's ``get_tokenizer`` returns them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tokenizers.mistral import MistralTokenizer

TEXT = 'Tom "said" <script>alert(1)</script>\n\t  شكرا 👍🏽 é\x00'
PLAIN = 'Tom "said" <script>alert(1)</script>\n\t  شكرا'
"""What no tokenizer here that has learned it splits within a character."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(0x100)]
_PIECES = ["▁", "T", "o", "m", "▁T", "om", "▁Tom", "▁▁", "a", "<", ">", '"', "شكرا", "▁é"]


def _fast(tokenizer: Tokenizer, **special: str) -> Any:
    return get_cached_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


def byte_level(directory: Path) -> Any:
    """BPE over bytes, as Qwen, Llama 3 and gpt-oss have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    made.train_from_iterator([PLAIN] * 9, trainer)
    made.add_tokens([AddedToken("▁Ġ odd", special=False)])
    return _fast(made, eos_token="<|end|>")


def llama(directory: Path) -> Any:
    """BPE with byte fallback whose decoder takes a space from the first token, as Llama 2's."""
    vocabulary = dict.fromkeys(["<unk>", "<s>", "<|end|>", *_BYTES, *_PIECES])
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    merges = [("▁", "T"), ("o", "m"), ("▁T", "om"), ("▁", "▁")]
    made = Tokenizer(models.BPE(numbers, merges, byte_fallback=True, unk_token="<unk>"))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([prepend, replace])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    made.add_special_tokens(["<s>", "<|end|>"])
    made.add_tokens([AddedToken("▁Ġ odd", special=False, normalized=False)])
    return _fast(made, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")


def unigram(directory: Path) -> Any:
    """SentencePiece's Unigram with byte fallback."""
    pieces = [("<unk>", 0.0), *((one, -20.0) for one in _BYTES), *((one, -2.0) for one in _PIECES)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(["<|end|>"])
    made.add_tokens([AddedToken("▁Ġ odd", special=False, normalized=False)])
    return _fast(made, eos_token="<|end|>", unk_token="<unk>")


def tekken(directory: Path) -> Any:
    """Mistral's own, of bytes."""
    pieces = [*(bytes([byte]) for byte in range(0x100)), b"To", b"Tom", b" \xf0\x9f"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(one).decode(), "token_str": None}
        for rank, one in enumerate(pieces)
    ]
    config = {
        "pattern": r"[^\r\n]+|\s+", "num_vocab_tokens": len(pieces), "version": "v3",
        "default_vocab_size": 1000 + len(pieces), "default_num_special_tokens": 1000,
    }  # fmt: skip
    (directory / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary}))
    return MistralTokenizer.from_pretrained(str(directory))


KINDS = {made.__name__: made for made in (byte_level, llama, unigram, tekken)}

"""The bytes that one token stands for at most, against the tokenizers library."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from paraserve_backend.weights.checkpoint.token_lengths import (
    longest_token_bytes,
    read_longest_token,
)
from paraserve_backend.weights.sources.base import StoredObject
from paraserve_backend.weights.sources.open import open_source

_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
_FALLBACK = [f"<0x{value:02X}>" for value in range(256)]
#: Merged step by step; the longest has seven bytes.
_MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("é", "é")]


def byte_level() -> Tokenizer:
    # "é" is spelt with two characters, a byte each.
    merges = [*_MERGES[:-1], ("Ã", "©"), ("hello", "Ã©")]
    words = [*_ALPHABET, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    words = ["<unk>", *_FALLBACK, "▁", "h", "e", "l", "o", "é"]
    words += ["".join(pair) for pair in _MERGES]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocabulary, _MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def with_unknown(**model: Any) -> Tokenizer:
    words = ["<unk>", "h", "e", "he"]
    settings = {"unk_token": "<unk>", "fuse_unk": False, **model}
    vocabulary = {word: i for i, word in enumerate(words)}
    return Tokenizer(models.BPE(vocabulary, [("h", "e")], **settings))


def unigram(*, fallback: bool) -> Tokenizer:
    words = ["<unk>", *_FALLBACK, "h", "e", "hello"]
    pairs = [(word, -float(i)) for i, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(pairs, 0, fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def longest(tokenizer: Tokenizer) -> int:
    return longest_token_bytes(tokenizer.to_str().encode())


def normalized(tokenizer: Tokenizer, normalizer: Any) -> Tokenizer:
    tokenizer.normalizer = normalizer
    return tokenizer


def split(tokenizer: Tokenizer, pre_tokenizer: Any) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (byte_level(), 7),
        (byte_fallback(), 6),  # "<0xFF>": nobody says that it is one byte
        (with_unknown(), 5),  # "<unk>"
        (unigram(fallback=True), 6),
        (normalized(byte_level(), normalizers.NFC()), 21),
    ],
)
def test_the_longest_token_is_found(tokenizer: Tokenizer, expected: int) -> None:
    assert longest(tokenizer) == expected


def test_an_added_token_counts_with_the_bytes_it_has_in_a_prompt() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|ééé|>"])
    assert longest(tokenizer) == 10


_KNOWN = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "unknown": with_unknown(),
    "unigram": unigram(fallback=True),
    "NFC": normalized(byte_level(), normalizers.NFC()),
    "NFD": normalized(byte_level(), normalizers.NFD()),
}
_TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(["hello", "helloé", " ", "é", "e\u0301", "\u1fef", "\U0001f336", "<0xFF>"])
    ).map("".join),
    st.text().map(lambda text: unicodedata.normalize("NFD", text)),
)


@pytest.mark.parametrize("name", list(_KNOWN))
@given(text=_TEXTS)
def test_no_prompt_has_more_bytes_than_its_tokens_times_that(name: str, text: str) -> None:
    tokenizer = _KNOWN[name]
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert len(text.encode()) <= num_tokens * longest(tokenizer)


def _without_bytes() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(_ALPHABET[1:])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _truncating() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(8)
    return tokenizer


def _stripping(**sides: bool) -> Tokenizer:
    from tokenizers import AddedToken

    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<end>", **sides)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        *(
            normalized(byte_level(), normalizer)
            for normalizer in (
                normalizers.Strip(),
                normalizers.NFKC(),
                normalizers.StripAccents(),
                normalizers.BertNormalizer(),
                normalizers.Nmt(),
                normalizers.Lowercase(),
                normalizers.Replace("hello", "h"),
                normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
            )
        ),
        *(
            split(with_unknown(), pre_tokenizer)
            for pre_tokenizer in (
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Whitespace(),
                pre_tokenizers.BertPreTokenizer(),
                pre_tokenizers.CharDelimiterSplit("|"),
                pre_tokenizers.Split(" ", "removed"),
                pre_tokenizers.Punctuation("removed"),
            )
        ),
        with_unknown(fuse_unk=True),
        with_unknown(unk_token=None),
        with_unknown(byte_fallback=True),
        unigram(fallback=False),
        Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>")),
        Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1})),
        _without_bytes(),
        _truncating(),
        _stripping(lstrip=True),
        _stripping(rstrip=True),
    ],
)
def test_where_text_can_vanish_nothing_is_known(tokenizer: Tokenizer) -> None:
    assert longest(tokenizer) == 0


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ('"ab\\u00e9"', 4),
        ('"\\ud83c\\udf36"', 4),
        ('"\\"\\\\\\n"', 4),
        ('"\\\\\\\\\\\\\\\\\\\\"', 5),
    ],
)
def test_escapes_count_as_what_they_stand_for(spelling: str, expected: int) -> None:
    text = f'{{"model": {{"unk_token": "?", "vocab": {{{spelling}: 7, "?": 0}}}}}}'
    json.loads(text)
    assert longest_token_bytes(text.encode()) == expected


# ---- files ----


def read(folder: Path, content: bytes) -> int:
    (folder / "tokenizer.json").write_bytes(content)
    source = open_source(str(folder))
    return read_longest_token(source, source.list())


def test_the_tokenizer_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, byte_level().to_str().encode()) == 7


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"nonsense",
        b"[]",
        b"\xff\xfe",
        b'{"model": {"vocab": 3}}',
        b'{"model": {"unk_token": "?", "vocab": {"\\ud800 is longer than others": 1}}}',
        b"[" * 1_000_000,
        b'{"normalizer":' + b'{"type": "Sequence", "normalizers": [' * 100_000,
    ],
)
def test_of_a_damaged_file_nothing_is_known(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == 0


def test_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    gone = StoredObject(key="tokenizer.json", size_bytes=5, version="v1")
    assert read_longest_token(open_source(str(tmp_path)), [gone]) == 0

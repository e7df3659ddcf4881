"""Prompts that are far too long cost as much as the context, not as much as the prompt."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.generation.prompts import PromptTokenizer
from paraserve_backend.generation.text import read_tokenizer

CONTEXT = 1000


def words() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def characters(*merged: str) -> Tokenizer:
    """Every byte is a token, and so are these strings of its alphabet."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {each: number for number, each in enumerate([*alphabet, *merged])}
    merges = [(each[:-1], each[-1]) for each in merged]
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def test_tokens_are_those_of_the_tokenizer() -> None:
    text = "wenn's regnet, dann schön 🌶 " * 30
    expected = characters("nn", "ab").encode(text).ids
    assert PromptTokenizer(characters("nn", "ab"), 10_000).ids(text) == expected


def test_a_text_is_refused_by_its_bytes_before_it_is_tokenised() -> None:
    prompts = PromptTokenizer(characters("aa", "aaa"), CONTEXT)
    assert prompts.max_bytes == 4 * CONTEXT
    with pytest.raises(InvalidRequest, match=r"has 4001 bytes; .* holds 4000 at most") as caught:
        prompts.ids("a" * 4001)
    assert "aa" not in str(caught.value)
    prompts.ids("a" * 4000)
    with pytest.raises(InvalidRequest, match="has 4001 bytes"):
        prompts.ids("🌶" * 1000 + "a")


def test_every_text_that_fits_into_the_context_is_let_through() -> None:
    longest = " ".join(["w99"] * (CONTEXT - 1))
    assert len(PromptTokenizer(words(), CONTEXT).ids(longest)) == CONTEXT - 1


def test_pieces_are_counted_until_it_is_certain_that_they_do_not_fit() -> None:
    # One long token makes the bytes no help.
    prompts = PromptTokenizer(characters(*("x" * n for n in range(2, 4000))), CONTEXT)
    text = "ab" * (1 << 20)
    assert len(text) < prompts.max_bytes
    started_s = time.process_time()
    with pytest.raises(InvalidRequest, match="has more than 2000 tokens; the context holds 1000"):
        prompts.ids(text)
    first_s = time.process_time() - started_s
    started_s = time.process_time()
    characters().encode_batch_fast([text])
    # The first piece of 64 Ki characters alone is tokenised.
    assert first_s < (time.process_time() - started_s) / 4


def test_what_a_tokenizer_cuts_or_pads_by_itself_it_does_not_here() -> None:
    tokenizer = words()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=8)
    read = read_tokenizer(tokenizer.to_str().encode())
    assert PromptTokenizer(read, CONTEXT).ids("w1 w2 w3 w4") == [1, 2, 3, 4]


def test_other_threads_go_on_while_a_long_prompt_is_tokenised() -> None:
    """`Tokenizer.encode` would keep them out for as long as it takes."""
    prompts = PromptTokenizer(characters(), 1 << 20)
    text = "a b" * 100_000
    turns = 0
    is_done = threading.Event()

    def count() -> None:
        nonlocal turns
        while not is_done.wait(0.0005):
            turns += 1

    counting = threading.Thread(target=count)
    counting.start()
    interval_s = sys.getswitchinterval()
    started_s = time.monotonic()
    prompts.ids(text)
    taken_s = time.monotonic() - started_s
    is_done.set()
    counting.join()
    assert taken_s > 2 * interval_s
    # Kept out it would get a turn before and one after.
    assert turns > 3

from __future__ import annotations

import gc
import logging
import random
import threading
import weakref
from collections.abc import Sequence
from typing import cast

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from paraserve_backend.generation.text import Detokenizer
from tests.support.odd_tokenizers import (
    REPLACEMENT,
    OddTokenizer,
    all_kinds,
    byte_fallback,
    byte_letters,
    byte_level,
)

KINDS = all_kinds()
BYTE_LEVEL = KINDS[0]
LLAMA = KINDS[1]
NUM_SEQUENCES = 20_000


def text_of(kind: OddTokenizer, prompt: Sequence[int], answer: Sequence[int]) -> str:
    detokenizer = Detokenizer(kind.tokenizer, list(prompt))
    return "".join([detokenizer.add(i) for i in answer]) + detokenizer.finish()


def byte_ids(data: bytes) -> list[int]:
    letters = byte_letters()
    return BYTE_LEVEL.ids(*(letters[byte] for byte in data))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_pieces_are_the_text_of_all_tokens_wherever_an_answer_is_cut(
    kind: OddTokenizer,
) -> None:
    rng = random.Random(2026)
    for _ in range(NUM_SEQUENCES):
        prompt, answer = kind.sequence(rng, 6), kind.sequence(rng, 24)
        cut = rng.randint(0, len(answer))
        detokenizer = Detokenizer(kind.tokenizer, prompt)
        early = "".join([detokenizer.add(i) for i in answer[:cut]])
        cut_here = early + detokenizer.held()
        whole = early + "".join([detokenizer.add(i) for i in answer[cut:]]) + detokenizer.finish()
        expected = kind.expected(prompt, answer)
        assert whole == expected, (prompt, answer)
        assert cut_here == kind.expected(prompt, answer[:cut]), (prompt, answer[:cut])
        assert expected.startswith(early), (prompt, answer, cut)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_text_goes_on_at_another_replica_where_it_was(kind: OddTokenizer) -> None:
    rng = random.Random(7)
    for _ in range(2000):
        prompt, answer = kind.sequence(rng, 6), kind.sequence(rng, 24)
        cut = rng.randint(0, len(answer))
        here, there = (Detokenizer(kind.tokenizer, prompt) for _ in range(2))
        for token_id in answer[:cut]:
            assert here.add(token_id) == there.add(token_id)
        assert here.held() == there.held()
        for token_id in answer[cut:]:
            assert here.add(token_id) == there.add(token_id)
        assert here.finish() == there.finish()


def test_one_invalid_byte_makes_its_whole_run_invalid() -> None:
    for prompt, answer, text in (
        (["<0x52>"], ["<0xF9>", "e"], "\ufffde"),
        ([], ["<0x0A>", "<0xF0>", "<0x9F>", "e"], "\ufffd\ufffd\ufffde"),
        ([], ["<0x54>", "<0xAB>"], "\ufffd\ufffd"),
        (["Hello"], ["<0x0A>", "<0xF0>", "<0x9F>", "e"], "\ufffd\ufffd\ufffde"),
        (["Hello"], ["<0xE5>", "<0xA5>", "<0xBD>", "<0xF0>", "<0x9F>", "e"], "\ufffd" * 5 + "e"),
        (["Hello"], ["<0xF0>", "<0x9F>", "<0x8C>", "<0xB6>", "e"], "🌶e"),
    ):
        assert text_of(LLAMA, LLAMA.ids(*prompt), LLAMA.ids(*answer)) == text


def test_nothing_of_an_open_run_of_bytes_is_shown() -> None:
    detokenizer = Detokenizer(LLAMA.tokenizer, LLAMA.ids("Hello"))
    run = LLAMA.ids("<0x0A>", "<0x41>", "<0xE5>", "</s>", "<0xA5>", "<0xBD>")
    assert [detokenizer.add(token_id) for token_id in run] == [""] * 6
    assert detokenizer.add(LLAMA.id("e")) == "\nA好e"


def test_bytes_of_the_prompt_never_join_those_of_the_answer() -> None:
    prompt = byte_ids(b"Hello world \xf0\x9f\x8c")
    assert text_of(BYTE_LEVEL, prompt, BYTE_LEVEL.ids("nd")) == "nd"
    assert text_of(BYTE_LEVEL, prompt, byte_ids(b"\xb6nd")) == "\ufffdnd"
    assert text_of(BYTE_LEVEL, byte_ids(b"\xf0"), BYTE_LEVEL.ids("v")) == "v"
    assert text_of(BYTE_LEVEL, byte_ids("my secret is \ufffd".encode()), byte_ids(b"x")) == "x"
    assert text_of(LLAMA, LLAMA.ids("T", "<0xE5>", "<0xA5>"), LLAMA.ids("<0xBD>", "e")) == "\ufffde"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (["T"], " Hello"),
        (["<s>", "T"], " Hello"),
        (["T", "▁"], " Hello"),
        (["T", "</s>", "<pad>"], " Hello"),
        # There is text, though no token of it stands for itself.
        (["<0x0A>"], " Hello"),
        (["▁"], " Hello"),
        ([REPLACEMENT], " Hello"),
        # There is none.
        (["<s>"], "Hello"),
        ([], "Hello"),
    ],
)
def test_an_answer_keeps_its_leading_space_where_text_comes_before_it(
    prompt: list[str], text: str
) -> None:
    assert text_of(LLAMA, LLAMA.ids(*prompt), LLAMA.ids("▁Hello")) == text


def test_a_long_prompt_of_broken_bytes_counts_as_text() -> None:
    prompt = LLAMA.ids("T", *["<0xFF>"] * 5000)
    assert text_of(LLAMA, prompt, LLAMA.ids("▁Hello", "ld")) == " Hellold"


def test_what_only_looks_like_a_byte_is_text_and_shown_at_once() -> None:
    for kind in KINDS:
        if kind.tokenizer.token_to_id("<0x41>") is None or "fallback" in kind.name:
            continue
        detokenizer = Detokenizer(kind.tokenizer, [kind.runs[0][0]])
        assert detokenizer.add(kind.id("<0x41>")).strip() == "<0x41>"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_token_id_ends_anything(kind: OddTokenizer) -> None:
    odd = [-1, -(2**70), 2**31, 2**32, 2**70, kind.tokenizer.get_vocab_size()]
    detokenizer = Detokenizer(kind.tokenizer, [*odd, *kind.silent])
    assert [detokenizer.add(token_id) for token_id in odd] == [""] * len(odd)
    assert [detokenizer.token_text(token_id) for token_id in odd] == [""] * len(odd)
    assert detokenizer.finish() == ""


def test_an_empty_answer_has_no_text() -> None:
    for kind in KINDS:
        for prompt in ([], list(kind.silent), [*kind.runs[0]]):
            assert Detokenizer(kind.tokenizer, prompt).finish() == ""


class Counting:
    """A tokenizer that counts how many ids it is asked to decode, and may break on some."""

    def __init__(self, tokenizer: Tokenizer, breaks_on: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._breaks_on = breaks_on
        self.num_decoded = 0
        self.id_to_token = tokenizer.id_to_token
        self.get_vocab_size = tokenizer.get_vocab_size
        self.get_added_tokens_decoder = tokenizer.get_added_tokens_decoder

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(ids)
        if self._breaks_on in ids:
            raise Panic("the text of somebody's answer")
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (BYTE_LEVEL, byte_ids(b"\xff")),
        (BYTE_LEVEL, byte_ids(b"\x80\xf0\x9f")),
        (BYTE_LEVEL, byte_ids("好".encode())),
        (BYTE_LEVEL, byte_ids(b" ")),
        (BYTE_LEVEL, [*byte_ids(b"\xe5"), *BYTE_LEVEL.ids("", "", "", "", "", "")]),
        (LLAMA, LLAMA.ids("▁")),
        (LLAMA, LLAMA.ids(REPLACEMENT)),
        (LLAMA, LLAMA.ids("<0xFF>")),
        (LLAMA, LLAMA.ids(*["<0x0A>"] * 40, "▁")),
        *((kind, [kind.runs[0][0]]) for kind in KINDS),
    ],
)
def test_a_token_costs_the_same_however_long_the_answer_is(
    kind: OddTokenizer, answer: list[int]
) -> None:
    counting = Counting(kind.tokenizer)
    detokenizer = Detokenizer(cast(Tokenizer, counting), [])
    num_before, num_tokens = counting.num_decoded, 0
    while num_tokens < 4000:
        for token_id in answer:
            detokenizer.add(token_id)
        num_tokens += len(answer)
    detokenizer.finish()
    assert counting.num_decoded - num_before < 14 * num_tokens


def test_a_tokenizer_that_breaks_ends_nothing_and_says_so_without_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = LLAMA.ids("Hello", "ld", "▁wor", "<0x41>", "e")
    breaking = cast(Tokenizer, Counting(LLAMA.tokenizer, breaks_on=ids[1]))
    with caplog.at_level(logging.ERROR):
        detokenizer = Detokenizer(breaking, [ids[1]])
        text = "".join(detokenizer.add(token_id) for token_id in ids + ids) + detokenizer.finish()
        assert detokenizer.token_text(ids[1]) == REPLACEMENT
    assert text == "Hello� worAe" * 2
    assert [record.getMessage() for record in caplog.records] == [
        "tokenizer.json cannot decode some tokens (Panic); they become U+FFFD."
    ]


def test_a_panic_of_the_library_itself_ends_nothing() -> None:
    vocabulary = {"  x": 0, "▁▁": 1, "ab": 2}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 2, 2)])
    with pytest.raises(BaseException, match="slice index"):
        tokenizer.decode([1])
    detokenizer = Detokenizer(tokenizer, [0])
    assert [detokenizer.add(token_id) for token_id in (2, 1, 2, 1)] == ["ab", "�", "ab", "�"]
    assert detokenizer.finish() == ""


def test_threads_may_share_a_tokenizer() -> None:
    kind = byte_fallback("shared", strips=True)
    rng = random.Random(3)
    cases = [(kind.sequence(rng, 4), kind.sequence(rng, 20)) for _ in range(300)]
    wrong: list[tuple[list[int], list[int]]] = []

    def check() -> None:
        wrong.extend(case for case in cases if text_of(kind, *case) != kind.expected(*case))

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_known_of_a_tokenizer_goes_with_it() -> None:
    kind = byte_level()
    assert text_of(kind, [], kind.ids("Hello")) == "Hello"
    tokenizer = weakref.ref(kind.tokenizer)
    del kind
    gc.collect()
    assert tokenizer() is None


def test_the_oracle_agrees_with_the_library_on_whole_texts() -> None:
    for kind in (byte_level(), *KINDS):
        rng = random.Random(4)
        for _ in range(300):
            answer = kind.sequence(rng, 12)
            assert kind.expected([], answer) == kind.tokenizer.decode(answer)

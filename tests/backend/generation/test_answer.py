from __future__ import annotations

import random

import pytest

from paraserve_backend.generation.answer import Answer, Delta
from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.sampling import ChosenToken
from tests.support.odd_tokenizers import OddTokenizer, all_kinds

KINDS = all_kinds()
LLAMA = KINDS[1]


def make_answer(
    kind: OddTokenizer,
    prompt: list[int],
    *,
    is_stream: bool = True,
    stop_words: tuple[str, ...] = (),
    min_tokens: int = 0,
) -> Answer:
    return Answer(
        detokenizer=Detokenizer(kind.tokenizer, prompt),
        stop_words=StopWords(stop_words),
        is_stream=is_stream,
        prefix="",
        num_input_tokens=len(prompt),
        min_tokens=min_tokens,
    )


def chosen(token_id: int) -> ChosenToken:
    return ChosenToken(token_id=token_id, logprob=-0.5, ranking=None)


def run(answer: Answer, ids: list[int], reason: str = "length") -> list[Delta]:
    """Return what is sent until the answer ends, by a stop word or with the last token."""
    sent: list[Delta] = []
    for number, token_id in enumerate(ids, start=1):
        delta = answer.add(chosen(token_id), reason if number == len(ids) else None)
        if delta is not None:
            sent.append(delta)
            if delta.finish_reason is not None:
                break
    return sent


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("reason", ["length", "stop"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_answer_is_the_text_of_its_tokens_to_the_last_byte(
    kind: OddTokenizer, reason: str
) -> None:
    rng = random.Random(11)
    for _ in range(1000):
        prompt, ids = kind.sequence(rng, 4), [*kind.sequence(rng, 10), kind.runs[0][0]]
        expected = kind.expected(prompt, ids if reason == "length" else ids[:-1])
        for is_stream in (True, False):
            sent = run(make_answer(kind, prompt, is_stream=is_stream), ids, reason)
            assert text_of(sent) == expected, (prompt, ids)
            assert sent[-1].finish_reason == reason


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_answer_that_goes_on_elsewhere_sends_each_character_once(kind: OddTokenizer) -> None:
    rng = random.Random(12)
    for _ in range(1000):
        prompt, ids = kind.sequence(rng, 4), [*kind.sequence(rng, 14), kind.runs[0][0]]
        words = tuple(rng.sample(["a", " ", "\N{REPLACEMENT CHARACTER}", "\n", "he", "好"], 1))
        cut = rng.randrange(len(ids))
        here = make_answer(kind, prompt, stop_words=words)
        early = [here.add(chosen(token_id), None) for token_id in ids[:cut]]
        sent = [delta for delta in early if delta is not None]
        if any(delta.finish_reason for delta in sent):
            continue
        there = make_answer(kind, prompt, stop_words=words)
        there.replay(chosen(token_id) for token_id in ids[:cut])
        whole = text_of(run(make_answer(kind, prompt, stop_words=words), ids))
        assert text_of(sent) + text_of(run(there, ids[cut:])) == whole


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_stop_word_ends_the_answer_where_it_first_stands_in_the_text(kind: OddTokenizer) -> None:
    rng = random.Random(13)
    for _ in range(1000):
        prompt, ids = kind.sequence(rng, 4), [*kind.sequence(rng, 14), kind.runs[0][0]]
        text = kind.expected(prompt, ids)
        if not text:
            continue
        start = rng.randrange(len(text))
        word = text[start : start + rng.randint(1, 3)]
        sent = run(make_answer(kind, prompt, stop_words=(word,)), ids)
        assert text_of(sent) == text[: text.index(word)], (prompt, ids, word)
        assert sent[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("ids", "reason", "text"),
    [
        (["Hello", "<0xF0>", "<0x9F>", "e"], "stop", "Hello\ufffd\ufffd"),
        (["Hello", "<0x0A>", "e"], "stop", "Hello\n"),
        (["Hello", "<0x0A>", "</s>"], "stop", "Hello\n"),
        (["Hello", "<0x0A>"], "length", "Hello\n"),
    ],
)
def test_an_end_token_shows_what_was_held_back_before_it_and_not_itself(
    ids: list[str], reason: str, text: str
) -> None:
    assert text_of(run(make_answer(LLAMA, [LLAMA.id("T")]), LLAMA.ids(*ids), reason)) == text


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_stop_word_counts_in_what_is_held_back_to_the_end(reason: str) -> None:
    answer = make_answer(LLAMA, [LLAMA.id("T")], stop_words=("\nA",))
    sent = run(answer, LLAMA.ids("Hello", "<0x0A>", "<0x41>", "</s>"), reason)
    assert (text_of(sent), sent[-1].finish_reason) == ("Hello", "stop")


def test_the_beginning_of_a_stop_word_is_shown_when_an_end_token_comes() -> None:
    answer = make_answer(LLAMA, [LLAMA.id("T")], stop_words=("Hello!",))
    assert text_of(run(answer, LLAMA.ids("Hello", "</s>"), "stop")) == "Hello"


def test_a_held_character_is_as_early_as_its_token() -> None:
    ids = LLAMA.ids("Hello", "<0x0A>", "e", "<0x0A>", "v")
    for min_tokens, text in ((1, "Hello"), (2, "Hello\ne"), (3, "Hello\ne"), (4, "Hello\ne\nv")):
        answer = make_answer(LLAMA, [LLAMA.id("T")], stop_words=("\n",), min_tokens=min_tokens)
        assert text_of(run(answer, ids)) == text

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.generation.text import Detokenizer, StopWords, read_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    made.train_from_iterator(["the cat sat on the mat, and so it was"] * 3, trainer)
    return made


@pytest.mark.parametrize("text", [" the cat", "naïve ☃ 🦀 end", "plain", "日本語"])
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    prompt = tokenizer.encode("so it was").ids
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.add(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) + detokenizer.finish() == text


def test_an_incomplete_character_is_held_back_and_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦀").ids
    detokenizer = Detokenizer(tokenizer, [])
    shown = "".join(detokenizer.add(token) for token in ids[:-1])
    assert shown == "a"
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    assert Detokenizer(tokenizer, [5]).add(end) == ""


@given(
    text=st.text("abc", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_words_cut_the_same_place_however_the_text_arrives(
    text: str, cuts: list[int], words: list[str]
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stopper, shown, stopped = StopWords(tuple(words)), "", False
    for start, end in itertools.pairwise(bounds):
        piece, stopped = stopper.add(text[start:end])
        shown += piece
        if stopped:
            break
    found = [at for word in words if (at := text.find(word)) >= 0]
    if stopped:
        assert found
        # The word that completes first ends the text; nothing of it or after it is shown.
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(word) for word in words)
    else:
        assert not found
        assert shown + stopper.finish() == text


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    num_early=st.integers(0, 8),
    words=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_word_counts_only_where_it_ends_late_enough(
    pieces: list[str], num_early: int, words: list[str]
) -> None:
    stopper, shown, stopped = StopWords(tuple(words)), "", False
    for number, piece in enumerate(pieces):
        text, stopped = stopper.add(piece, may_stop=number >= num_early)
        shown += text
        if stopped:
            break
    whole, early = "".join(pieces), len("".join(pieces[:num_early]))
    ends = [
        at + len(word)
        for word in words
        for at in range(len(whole))
        if whole.startswith(word, at) and at + len(word) > early
    ]
    assert stopped == bool(ends)
    if not stopped:
        assert shown + stopper.finish() == whole


def test_a_token_has_a_text_by_itself_even_a_special_one(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    assert Detokenizer(tokenizer, [5]).token_text(end) == "</s>"


def test_a_broken_tokenizer_file_is_named() -> None:
    with pytest.raises(InvalidCheckpoint, match=r"^tokenizer\.json cannot be read"):
        read_tokenizer(b"{}", {})


@pytest.mark.parametrize(
    ("stored", "value"),
    [
        ("truncation", {"max_length": 8, "direction": "Right", "strategy": "LongestFirst"}),
        ("padding", {"strategy": {"Fixed": 64}, "direction": "Left", "pad_id": 0}),
    ],
)
def test_prompts_are_neither_cut_nor_filled_up_as_a_tokenizer_file_says(
    tokenizer: Tokenizer, stored: str, value: dict[str, object]
) -> None:
    missing = {"direction": "Left", "stride": 0, "pad_type_id": 0, "pad_token": "<s>"}
    settings = json.loads(tokenizer.to_str())
    settings[stored] = {**missing, "pad_to_multiple_of": None, **value}
    prompt = "xyz" * 9
    read = read_tokenizer(json.dumps(settings).encode(), {})
    assert len(read.encode(prompt).ids) == 27
    assert [len(encoding.ids) for encoding in read.encode_batch([prompt, "xyz"])] == [27, 3]


def added(content: str, **flags: bool) -> dict[str, object]:
    defaults = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    return {"content": content, **defaults, **flags}


def test_special_tokens_that_only_the_config_has_are_whole_tokens(tokenizer: Tokenizer) -> None:
    size, start = tokenizer.get_vocab_size(), tokenizer.token_to_id("<s>")
    config = {
        "added_tokens_decoder": {
            str(size + 1): added("<|im_end|>", special=True),
            str(size): added("<|im_start|>", special=True),
            str(start): added("<s>", special=True),
        }
    }
    read = read_tokenizer(tokenizer.to_str().encode(), config)
    ids = read.encode("<|im_start|>the<|im_end|>").ids
    assert (ids[0], ids[-1]) == (size, size + 1)
    assert read.decode(ids) == "the"
    assert read.get_vocab_size() == size + 2


@pytest.mark.parametrize(
    "decoder",
    [
        {"5": {"special": True}},
        {"5": {"content": "x", "special": 1}},
        {"x": added("x")},
        {"5": 7},
        [1],
    ],
)
def test_an_added_token_that_is_none_is_named(tokenizer: Tokenizer, decoder: object) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"^tokenizer_config\.json: 'added_tokens_decoder'"):
        read_tokenizer(tokenizer.to_str().encode(), {"added_tokens_decoder": decoder})

"""A tokenizer made of both files cuts text as transformers' does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from paraserve_backend.architectures.added_tokens import added_tokens
from paraserve_backend.errors import InvalidCheckpoint

TEXTS = (
    "<|im_start|>user Once<|im_end|>\n",
    "a <|pad|> b<|pad|>c <mask> d",
    "<s>hello</s> <tool><think> tool think",
    "  <|im_end|>  x<img>y",
)


def write_tokenizer(folder: Path, config: Mapping[str, object], *present: str) -> Path:
    """Write a byte-level tokenizer.json that adds `present`, and this tokenizer_config.json."""
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, lstrip=True, special=True) for token in present]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def ours(folder: Path) -> Tokenizer:
    """As a replica makes it of the two files."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [tokenizers.AddedToken(**asdict(token)) for token in added_tokens(config, present)]
    )
    return tokenizer


def stated(*tokens: str, start: int = 256, **flags: bool) -> dict[str, object]:
    return {
        "added_tokens_decoder": {
            str(start + number): {"content": token, "special": True, **flags}
            for number, token in enumerate(tokens)
        }
    }


CONFIGS: Mapping[str, dict[str, Any]] = {
    "nothing": {},
    "null": {"bos_token": None, "extra_special_tokens": None},
    "stated": stated("<|im_start|>", "<|im_end|>"),
    "by id": {
        "added_tokens_decoder": {
            "1000": {"content": "<|im_end|>"},
            "256": {"content": "<|im_start|>", "special": True},
        }
    },
    "flags": stated("<|pad|>", "<|im_end|>", lstrip=True, rstrip=True, normalized=True),
    "single word": stated("tool", single_word=True),
    "not special": stated("<think>", special=False),
    "named": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"},
    "named and stated": {**stated("</s>", special=False), "eos_token": "</s>"},
    "named as an object": {
        "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True}
    },
    "named otherwise": {"image_token": "<img>", "add_bos_token": True},
    "extra": {"extra_special_tokens": ["<think>", "<tool>"]},
    "extra with roles": {"extra_special_tokens": {"image_token": "<img>"}},
    "additional": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "both": {
        **stated("<|im_start|>"),
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<think>"],
    },
}
PRESENT: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "some": ("<|im_end|>", "</s>"),
    "all": ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|pad|>", "<mask>", "<img>"),
}


@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("config", CONFIGS)
def test_text_is_cut_as_transformers_cuts_it(config: str, present: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, CONFIGS[config], *PRESENT[present])
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = ours(folder)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        shown = theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == shown


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"added_tokens_decoder": []}, "'added_tokens_decoder' must be an object from token ids"),
        ({"added_tokens_decoder": {"x": {}}}, "must be an object from token ids"),
        ({"added_tokens_decoder": {"1": "<s>"}}, "must be an object from token ids"),
        ({"added_tokens_decoder": {"1": {}}}, "must be a token, as text or as an object"),
        ({"added_tokens_decoder": {"1": {"content": 1}}}, "must be a token, as text"),
        ({"added_tokens_decoder": {"1": {"content": "", "special": 1}}}, "special are true or fal"),
        ({"eos_token": 2}, "'eos_token' must be a token"),
        ({"additional_special_tokens": "<s>"}, "'additional_special_tokens' must be a list"),
        ({"extra_special_tokens": [1]}, "'extra_special_tokens' must be a token"),
    ],
)
def test_a_token_that_is_described_wrongly_is_named(
    config: Mapping[str, object], sentence: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"tokenizer_config.json: .*{sentence}"):
        added_tokens(config, ())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["content", "special", "1", "2", "x"]), inner)
    ),
    max_leaves=6,
)


@given(
    config=st.dictionaries(
        st.sampled_from(
            [
                "added_tokens_decoder",
                "eos_token",
                "image_token",
                "extra_special_tokens",
                "additional_special_tokens",
            ]
        ),
        JSON,
    )
)
def test_any_json_is_read_or_refused_by_us(config: dict[str, object]) -> None:
    try:
        tokens = added_tokens(config, {"x"})
    except InvalidCheckpoint:
        return
    assert len({token.content for token in tokens}) == len(tokens)

"""The tokens that tokenizer_config.json adds to those of tokenizer.json; pure.

Published folders often have their chat markers in only one of the two files. Transformers reads
both, and without these a marker is cut into pieces of plain text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from paraserve_backend.errors import InvalidCheckpoint

_FILE = "tokenizer_config.json"
#: The roles that every tokenizer may give a token, in the order in which transformers adds them.
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is found in text before the rest is cut up; fields as `tokenizers` has them."""

    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


def added_tokens(
    tokenizer_config: Mapping[str, object], present: Collection[str]
) -> tuple[AddedToken, ...]:
    """Return what to add to a tokenizer, in this order, since ids follow from it.

    Args:
        tokenizer_config: tokenizer_config.json as parsed.
        present: the contents of the tokens that tokenizer.json adds.

    Raises:
        InvalidCheckpoint: the file describes a token wrongly.
    """
    named = list(_named(tokenizer_config))
    special = {token.content for token in named}
    stated = [
        replace(token, special=token.special or token.content in special)
        for token in _stated(tokenizer_config)
    ]
    tokens = {token.content: token for token in stated}
    for token in (*named, *_extra(tokenizer_config)):
        if token.content not in present:
            tokens.setdefault(token.content, token)
    return tuple(tokens.values())


def _stated(config: Mapping[str, object]) -> Iterator[AddedToken]:
    """The tokens of `added_tokens_decoder`, by their ids."""
    field = "added_tokens_decoder"
    by_id = config.get(field)
    if by_id is None:
        return
    if not isinstance(by_id, dict) or not all(_is_id(key) for key in by_id):
        raise _wrong(field, "an object from token ids to tokens")
    for _, token in sorted(by_id.items(), key=lambda item: int(item[0])):
        if not isinstance(token, dict):
            raise _wrong(field, "an object from token ids to tokens")
        yield _read(field, token, special=False)


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def _named(config: Mapping[str, object]) -> Iterator[AddedToken]:
    """The tokens with a role, those that every tokenizer has before those of this one."""
    own = [
        field
        for field, value in config.items()
        # Other fields may end so, too: `add_bos_token` is a flag.
        if field.endswith("_token") and field not in _ROLES and isinstance(value, str)
    ]
    for field in (*_ROLES, *own):
        if config.get(field) is not None:
            yield _read(field, config[field], special=True)
    more = config.get("extra_special_tokens")
    if isinstance(more, dict):
        for role, value in more.items():
            yield _read(role, value, special=True)


def _extra(config: Mapping[str, object]) -> Iterator[AddedToken]:
    """The special tokens without a role."""
    more, field = config.get("extra_special_tokens"), "extra_special_tokens"
    if not more:
        more, field = config.get("additional_special_tokens"), "additional_special_tokens"
    if more is None or isinstance(more, dict):
        return
    if not isinstance(more, list):
        raise _wrong(field, "a list of tokens")
    for value in more:
        yield _read(field, value, special=True)


def _read(field: str, value: object, *, special: bool) -> AddedToken:
    """A token as text or as an object; what the object leaves out is as `tokenizers` has it."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(content := fields.get("content"), str):
        raise _wrong(field, "a token, as text or as an object with its 'content'")
    flags = {name: fields[name] for name in _FLAGS if fields.get(name) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(field, f"a token whose {', '.join(_FLAGS)} are true or false")
    special = flags.get("special", special)
    return AddedToken(
        content=content,
        single_word=flags.get("single_word", False),
        lstrip=flags.get("lstrip", False),
        rstrip=flags.get("rstrip", False),
        normalized=flags.get("normalized", not special),
        special=special,
    )


def _wrong(field: str, expected: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"{_FILE}: '{field}' must be {expected}.")

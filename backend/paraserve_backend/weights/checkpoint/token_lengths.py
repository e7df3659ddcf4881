"""How many bytes of a prompt one token stands for at most, by tokenizer.json.

The file is read in the process that reads the checkpoint (`weights.checkpoint.child`), whose memory
and time are bounded: a hostile file costs nobody else anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from paraserve_backend.errors import ParaServeError
from paraserve_backend.weights.sources.base import Source, StoredObject
from paraserve_backend.weights.sources.retry import read_range

_TOKENIZER = "tokenizer.json"
#: How many times shorter composing characters, or taking them apart, makes a text at most (UTF-8).
_NORMAL_FORM_FACTOR = 3
#: A token for what the vocabulary does not know stands for one character.
_MOST_CHARACTER_BYTES = 4
_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_NUM_BYTES = 256
#: The characters that spell bytes by themselves; the other bytes are spelt from U+0100 on.
_OWN_CHARACTER = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTE_CHARACTERS = frozenset(
    map(chr, [*_OWN_CHARACTER, *range(0x100, 0x200 - len(_OWN_CHARACTER))])
)


def read_longest_token(source: Source, files: Sequence[StoredObject]) -> int:
    """Return `longest_token_bytes` of a checkpoint's tokenizer; 0, not known, where there is none.

    What is wrong with the file, a start of the model says.
    """
    tokenizer = next((stored for stored in files if stored.key == _TOKENIZER), None)
    if tokenizer is None:
        return 0
    try:
        return longest_token_bytes(read_range(source, tokenizer))
    except (ParaServeError, ValueError, MemoryError, RecursionError):
        return 0


def longest_token_bytes(text: bytes) -> int:
    """Return the most bytes of a prompt that become one token; 0: not known.

    A prompt of more bytes than the context times this has more tokens than the context. So a number
    is given only where no byte of a prompt can vanish. It is 0 where a normalizer, or a
    pre-tokenizer, may take characters away, where an added token swallows white space beside it,
    where the file cuts prompts off, and where what the vocabulary does not know is left out or
    becomes one token however long it is. NFC and NFD count with the factor by which they shorten a
    text at most. Where tokens spell bytes, each of their characters is one byte. In others a space
    is spelt with a character of three bytes: the number may be larger than need be, never smaller.

    Raises:
        ValueError: it is no tokenizer.json.
    """
    try:
        tokenizer = msgspec.json.decode(text, type=_Tokenizer)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    factor = _shortening(tokenizer.normalizer)
    if tokenizer.truncation is not None or not factor or not _keeps_all(tokenizer.pre_tokenizer):
        return 0
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens):
        return 0
    longest = _longest_of_vocabulary(tokenizer)
    if not longest:
        return 0
    added = (len(token.content.encode()) for token in tokenizer.added_tokens)
    return factor * max(longest, *added, 1)


class _Step(msgspec.Struct, kw_only=True):
    """A normalizer or pre-tokenizer, which may be a sequence of such."""

    type: str
    normalizers: list[_Step] = []
    pretokenizers: list[_Step] = []
    behavior: str = ""
    pattern: dict[str, str] = {}
    content: str = ""


class _AddedToken(msgspec.Struct, kw_only=True):
    content: str
    lstrip: bool = False
    rstrip: bool = False


class _Model(msgspec.Struct, kw_only=True):
    type: str = "BPE"
    #: An object from token to number, or a list of pairs that begin with the token.
    vocab: msgspec.Raw
    byte_fallback: bool = False
    fuse_unk: bool = False
    unk_token: str | None = None


class _Tokenizer(msgspec.Struct, kw_only=True):
    model: _Model
    added_tokens: list[_AddedToken] = []
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    truncation: dict[str, object] | None = None


def _shortening(normalizer: _Step | None) -> int:
    """By what factor it makes a text shorter at most; 0: nobody knows."""
    if normalizer is None:
        return 1
    match normalizer.type:
        case "Sequence":
            factor = 1
            for step in normalizer.normalizers:
                factor *= _shortening(step)
            return factor
        case "NFC" | "NFD":
            return _NORMAL_FORM_FACTOR
        case "ByteLevel" | "Prepend":
            return 1
        case "Replace":
            replaced = normalizer.pattern.get("String")
            grows = replaced and len(normalizer.content.encode()) >= len(replaced.encode())
            return 1 if grows else 0
    return 0


def _keeps_all(pre_tokenizer: _Step | None) -> bool:
    if pre_tokenizer is None:
        return True
    match pre_tokenizer.type:
        case "Sequence":
            return all(map(_keeps_all, pre_tokenizer.pretokenizers))
        case "ByteLevel" | "Metaspace" | "Digits":
            return True
        case "Split" | "Punctuation":
            return pre_tokenizer.behavior != "Removed"
    return False


def _longest_of_vocabulary(tokenizer: _Tokenizer) -> int:
    """Return the bytes of the longest token of the model; 0: some texts vanish in one."""
    model = tokenizer.model
    spelling = bytes(model.vocab)
    if _has_step(tokenizer.pre_tokenizer, "ByteLevel") or _has_step(
        tokenizer.normalizer, "ByteLevel"
    ):
        return _longest_byte_level(spelling) if model.type == "BPE" else 0
    longest = _longest_bytes(spelling)
    if model.byte_fallback and model.type in ("BPE", "Unigram"):
        fallback = {b"<0x%02X>" % value for value in range(_NUM_BYTES)}
        return longest if fallback <= set(_tokens(spelling, len("<0xFF>"))) else 0
    if model.type == "BPE" and model.unk_token is not None and not model.fuse_unk:
        return max(longest, _MOST_CHARACTER_BYTES)
    return 0


def _has_step(step: _Step | None, kind: str) -> bool:
    if step is None:
        return False
    steps = (*step.normalizers, *step.pretokenizers)
    return step.type == kind or any(_has_step(each, kind) for each in steps)


def _longest_byte_level(spelling: bytes) -> int:
    """Each character is a byte; all bytes must be there, for others are left out."""
    longest, missing = 0, set(_BYTE_CHARACTERS)
    for token in _tokens(spelling, len(spelling)):
        text = _decoded(token)
        longest = max(longest, len(text))
        missing.discard(text)
    return 0 if missing else longest


def _longest_bytes(spelling: bytes) -> int:
    longest = 0
    for token in _tokens(spelling, len(spelling)):
        # An escape has more bytes than what it stands for.
        if len(token) > longest:
            longest = max(longest, len(_decoded(token).encode(errors="surrogatepass")))
    return longest


def _tokens(spelling: bytes, most_bytes: int) -> Iterator[bytes]:
    """Yield the strings of a vocabulary as JSON spells them, one at a time."""
    for match in _STRING.finditer(spelling):
        token = match.group(1)
        if len(token) <= most_bytes:
            yield token


def _decoded(token: bytes) -> str:
    if b"\\" not in token:
        return token.decode()
    return msgspec.json.decode(b'"' + token + b'"', type=str)

"""What kinds of tokens a tokenizer has, as far as their text depends on their neighbours.

It finds that out by decoding, because decoders are many and may be combined in any order. It is
also the one place that decodes, so that nothing a tokenizer does to some tokens ends anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Tokens looked at to find any that is text by itself; tokenizers begin with at most some hundreds
#: of special ones and bytes.
_MAX_SEARCHED = 4096
#: Tokens whose kind or text is kept; models use few of theirs often.
_MAX_REMEMBERED = 16384

_logger = logging.getLogger(__name__)


class TokenKind(Enum):
    #: A special token, or none at all: it is dropped before the others are decoded.
    SILENT = "silent"
    #: A byte of a byte-fallback tokenizer. One invalid byte of a run makes the whole run invalid.
    BYTE = "byte"
    #: It has no text and changes none, but ends a run of bytes.
    VOID = "void"
    #: Whole characters, but whitespace, or text that is another at the beginning.
    WHOLE = "whole"
    #: It may begin or end within a character.
    OPEN = "open"
    #: Whole characters, and the same ones wherever it stands: what follows needs no more before it.
    SOLID = "solid"


class Vocabulary:
    """The tokens of one tokenizer; made once for each and shared by its requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._kinds: dict[int, TokenKind] = {}
        self._texts: dict[int, str] = {}
        self._has_failed = False
        #: A solid token, for prompts that have none.
        self.filler: tuple[int, ...] = ()
        self.filler = self._find_filler(tokenizer)

    def kind(self, tokenizer: Tokenizer, token_id: int) -> TokenKind:
        kind = self._kinds.get(token_id)
        if kind is None:
            kind = self._look_at(tokenizer, token_id)
            if len(self._kinds) >= _MAX_REMEMBERED:
                self._kinds.clear()
            self._kinds[token_id] = kind
        return kind

    def text_alone(self, tokenizer: Tokenizer, token_id: int) -> str:
        """Return what a token is as the first of a text."""
        text = self._texts.get(token_id)
        if text is None:
            text = self.decode(tokenizer, [token_id]) or ""
            if len(self._texts) >= _MAX_REMEMBERED:
                self._texts.clear()
            self._texts[token_id] = text
        return text

    def decode(
        self, tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str | None:
        """Return the tokens' text, `None` where the tokenizer fails."""
        if not ids:  # some decoders cannot take none
            return ""
        try:
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the library's Rust code is no Exception
            # What the error says may hold text of the answer.
            if not self._has_failed:
                _logger.error(
                    "tokenizer.json cannot decode some tokens (%s); they become U+FFFD.",
                    type(error).__name__,
                )
            self._has_failed = True
            return None

    def _find_filler(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        for token_id in range(_MAX_SEARCHED):
            if self._look_at(tokenizer, token_id) is TokenKind.SOLID:
                return (token_id,)
        return ()

    def _look_at(self, tokenizer: Tokenizer, token_id: int) -> TokenKind:
        spelling = spelling_of(tokenizer, token_id)
        if spelling is None or spelling in self._special:
            return TokenKind.SILENT
        before = self.decode(tokenizer, self.filler)
        whole = self.decode(tokenizer, [*self.filler, token_id])
        if whole is None or before is None or not whole.startswith(before):
            return TokenKind.OPEN
        text = whole[len(before) :]
        if _is_spelled_as_byte(spelling) and spelling not in text:
            return TokenKind.BYTE
        if REPLACEMENT in text:
            return TokenKind.OPEN
        if text and not text.isspace():
            # The first of a text may lack a space that the others have.
            alone = self.decode(tokenizer, [token_id])
            return TokenKind.SOLID if alone and text.endswith(alone) else TokenKind.WHOLE
        return TokenKind.VOID if self._changes_nothing(tokenizer, token_id) else TokenKind.WHOLE

    def _changes_nothing(self, tokenizer: Tokenizer, token_id: int) -> bool:
        without, between = (*self.filler, *self.filler), (*self.filler, token_id, *self.filler)
        after = (*self.filler, token_id)
        return bool(self.filler) and (
            self.decode(tokenizer, between) == self.decode(tokenizer, without)
            and self.decode(tokenizer, after) == self.decode(tokenizer, self.filler)
        )


#: Values hold no tokenizer, so that one that nobody uses goes.
_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    known = _vocabularies.get(tokenizer)
    if known is None:
        known = _vocabularies[tokenizer] = Vocabulary(tokenizer)
    return known


def spelling_of(tokenizer: Tokenizer, token_id: int) -> str | None:
    try:
        return tokenizer.id_to_token(token_id)
    except OverflowError:  # negative, or of more than 32 bits
        return None


def _is_spelled_as_byte(spelling: str) -> bool:
    return len(spelling) == len("<0x00>") and spelling.startswith("<0x") and spelling.endswith(">")

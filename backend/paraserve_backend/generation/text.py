"""Tokens to text: reads tokenizer.json, decodes incrementally, and holds back stop words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from types import MappingProxyType

from tokenizers import AddedToken, Tokenizer

from paraserve_backend.architectures.added_tokens import added_tokens
from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.generation.vocabulary import (
    REPLACEMENT,
    TokenKind,
    spelling_of,
    vocabulary_of,
)

_NO_CONFIG: Mapping[str, object] = MappingProxyType({})
#: So many of a prompt's last tokens are searched for text.
_MAX_LOOKED_BACK = 256
#: Tokens that are decoded again for the next one, at most; runs of bytes are as long as they are.
_MAX_WINDOW_TOKENS = 8
#: An incomplete character has at most three bytes, and no token is without one.
_KEPT_TOKENS = 4


def read_tokenizer(content: bytes, config: Mapping[str, object] = _NO_CONFIG) -> Tokenizer:
    """Read a checkpoint's tokenizer.json, and add what its tokenizer_config.json adds.

    Raises:
        InvalidCheckpoint: the file is not a tokenizer, or a token that is to be added is none.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidCheckpoint(f"tokenizer.json cannot be read: {error}.") from error
    # A file may store what somebody once trained with; prompts are taken as they are.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    added = added_tokens(config, present)
    tokenizer.add_tokens([AddedToken(**asdict(token)) for token in added])
    return tokenizer


class Detokenizer:
    """Turns one sequence's output ids into text, piece by piece; special tokens are left out.

    The pieces add up to the text of all output tokens as they stand behind the prompt, with U+FFFD
    for bytes that are no UTF-8. Bytes of the prompt never join those of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary_of(tokenizer)
        self._kind = partial(self._vocabulary.kind, tokenizer)
        self._decode = partial(self._vocabulary.decode, tokenizer)
        #: Tokens before the window: their text is whole and has been shown.
        self._num_before = 0
        self._ids: list[int] = []
        #: What has been shown of these tokens' text.
        self._text = ""
        #: Bytes have come, and one that follows may make all of them invalid.
        self._is_in_run = False
        self._context = self._find_context(prompt_ids)
        self._restart()

    def add(self, token_id: int) -> str:
        """Return the text this token completes; empty while a character is still incomplete."""
        kind = self._kind(token_id)
        if kind is TokenKind.SOLID:
            return self._add_solid(token_id)
        if kind is TokenKind.SILENT:
            return ""
        if kind is TokenKind.VOID and self._ids and not self._is_in_run:
            return ""
        self._ids.append(token_id)
        self._is_in_run = kind is TokenKind.BYTE
        return "" if self._is_in_run else self._show(may_hold=kind is TokenKind.OPEN)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself, special or not; none for an unknown one."""
        if spelling_of(self._tokenizer, token_id) is None:
            return ""
        text = self._decode([token_id], skip_special_tokens=False)
        return REPLACEMENT if text is None else text

    def held(self) -> str:
        """Return what is held back: characters that are not complete yet."""
        whole = self._decode(self._ids)
        return REPLACEMENT if whole is None else _added(self._text, whole)

    def finish(self) -> str:
        """Return what is held back, for no more tokens come."""
        piece = self.held()
        self._restart()
        return piece

    def _find_context(self, prompt_ids: list[int]) -> list[int]:
        """Return tokens that make a decoder see text before the answer, if the prompt has text.

        They are the prompt's last solid token and what has whole characters behind it. Where there
        is none, any solid token serves: what counts is that the answer is not a text's beginning.
        """
        behind: list[int] = []
        has_text = len(prompt_ids) > _MAX_LOOKED_BACK
        for token_id in reversed(prompt_ids[-_MAX_LOOKED_BACK:]):
            kind = self._kind(token_id)
            if kind is TokenKind.SOLID:
                return [token_id, *behind]
            if kind is TokenKind.WHOLE and len(behind) < _KEPT_TOKENS:
                behind.insert(0, token_id)
            has_text = has_text or kind is not TokenKind.SILENT
        return [*self._vocabulary.filler, *behind] if has_text else []

    def _restart(self) -> None:
        text = self._decode(self._context)
        if text is None:
            self._begin([], "")
        else:
            self._begin([*self._context], text)

    def _begin(self, context: list[int], text: str) -> None:
        self._num_before = len(context)
        self._ids = context
        self._text = text
        self._is_in_run = False

    def _add_solid(self, token_id: int) -> str:
        self._ids.append(token_id)
        whole = self._decode(self._ids)
        if whole is None:
            return self._replace_last()
        piece = _added(self._text, whole)
        self._begin([token_id], self._vocabulary.text_alone(self._tokenizer, token_id))
        return piece

    def _show(self, *, may_hold: bool) -> str:
        whole = self._decode(self._ids)
        if whole is None:
            return self._replace_last()
        # An incomplete character is one U+FFFD at the end; a later token may complete it.
        held = may_hold and whole.endswith(REPLACEMENT)
        shown, self._text = self._text, whole[:-1] if held else whole
        piece = _added(shown, self._text)
        if len(self._ids) - self._num_before > _MAX_WINDOW_TOKENS:
            self._shorten(held=held)
        return piece

    def _shorten(self, *, held: bool) -> None:
        """Forget tokens whose text is settled, so that a token costs the same whatever came."""
        del self._ids[self._num_before : -_KEPT_TOKENS]
        text = self._decode(self._ids)
        if text is None:
            self._restart()
        else:
            self._text = text[:-1] if held else text

    def _replace_last(self) -> str:
        self._ids.pop()
        piece = self.finish() + REPLACEMENT
        if not self._context:  # now there is text before what follows
            self._context = [*self._vocabulary.filler]
            self._restart()
        return piece


def _added(shown: str, whole: str) -> str:
    """Return what follows the shown text. Where a decoder has changed that, it stays as it is."""
    if whole.startswith(shown):
        return whole[len(shown) :]
    pairs = enumerate(zip(shown, whole, strict=False))
    same = next((at for at, (a, b) in pairs if a != b), len(whole))
    return whole[same:]


class StopWords:
    """Holds text back while it may be the beginning of a stop word."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._held = ""
        #: So many characters of the held text are too early for a stop word to end in.
        self._num_exempt = 0

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop word was reached.

        The stop word itself and what follows it are never shown. One that ends in text that was
        added without `may_stop` does not count.
        """
        if not self._words:
            return text, False
        self._held += text
        if not may_stop:
            self._num_exempt = len(self._held)
        found = [at for word in self._words if (at := self._find(word)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        return self._release(max(map(self._overlap, self._words))), False

    def finish(self) -> str:
        return self._release(0)

    def _find(self, word: str) -> int:
        return self._held.find(word, max(0, self._num_exempt - len(word) + 1))

    def _release(self, num_kept: int) -> str:
        end = len(self._held) - num_kept
        shown, self._held = self._held[:end], self._held[end:]
        self._num_exempt = max(0, self._num_exempt - end)
        return shown

    def _overlap(self, word: str) -> int:
        """Length of the longest end of the held text that begins `word`."""
        longest = min(len(word) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(word[:n])), 0)

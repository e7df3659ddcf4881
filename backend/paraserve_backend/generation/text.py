"""Tokens to text: reads tokenizer.json, decodes incrementally, and holds back stop words."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from paraserve_backend.errors import InvalidCheckpoint

#: Prompt tokens the decoder sees first, so that a leading space of the answer is not lost.
_CONTEXT_TOKENS = 6


def read_tokenizer(content: bytes) -> Tokenizer:
    """Read what a tokenizer.json holds.

    Raises:
        InvalidCheckpoint: the file is not a tokenizer.
    """
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidCheckpoint(f"tokenizer.json cannot be read: {error}.") from error


class Detokenizer:
    """Turns one sequence's output ids into text, piece by piece; special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = prompt_ids[-_CONTEXT_TOKENS:]
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
        self._output_ids: list[int] = []
        self._emitted = ""

    def add(self, token_id: int) -> str:
        """Return the text this token completes; empty while a character is still incomplete."""
        self._output_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += piece
        return piece

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself, special or not."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def finish(self) -> str:
        """Return what the stream still holds back: characters that never became complete."""
        before = self._tokenizer.decode(self._context)
        whole = self._tokenizer.decode(self._context + self._output_ids)
        text = whole[len(before) :]
        return text[len(self._emitted) :] if text.startswith(self._emitted) else ""


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

"""Text in and out: a Hugging Face tokenizer.json, incremental decoding, stop words."""

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

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop word was reached.

        The stop word itself and what follows it are never shown.
        """
        if not self._words:
            return text, False
        self._held += text
        found = [at for word in self._words if (at := self._held.find(word)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(self._overlap(word) for word in self._words)
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown, False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _overlap(self, word: str) -> int:
        """Length of the longest end of the held text that begins `word`."""
        longest = min(len(word) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(word[:n])), 0)

"""Makes token ids of prompts within bounds: of time and memory by the context, not by the prompt.

It runs beside threads that serve. The package tokenizers keeps Python's lock while it encodes one
text, and gives it up while it encodes a batch, so every text goes in as a batch of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from tokenizers import Tokenizer

from paraserve_backend.errors import InvalidRequest

#: Longer texts are counted piece by piece first.
_PIECE_CHARACTERS = 64 << 10
#: A text whose pieces have so many times the tokens of the context is too long for certain: a cut
#: adds a token or two to a piece.
_CLEARLY_MORE = 2


class PromptTokenizer:
    """Used by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context

    @cached_property
    def max_bytes(self) -> int:
        """Bytes of the longest text that can fit into the context.

        Found when the first long text comes, token by token, so that no other thread waits for it.
        """
        vocabulary_size = self._tokenizer.get_vocab_size()
        tokens = map(self._tokenizer.id_to_token, range(vocabulary_size))
        longest = max((len(token.encode()) for token in tokens if token is not None), default=1)
        # Some tokenizers drop a space between two words.
        return self._max_context * (longest + 1)

    def ids(self, text: str) -> list[int]:
        """Return the text's tokens, special ones included.

        Raises:
            InvalidRequest: it is longer than the context can hold.
        """
        # Every token has a byte at least: only a longer text can be too long.
        if len(text) > self._max_context:
            self._refuse_by_bytes(text)
        if len(text) > _PIECE_CHARACTERS:
            self._refuse_by_pieces(text)
        (encoding,) = self._tokenizer.encode_batch_fast([text])
        return encoding.ids

    def _refuse_by_bytes(self, text: str) -> None:
        # In pieces, too: encoding a whole text keeps Python's lock.
        num_bytes = sum(len(piece.encode()) for piece in _pieces(text))
        if num_bytes > self.max_bytes:
            raise InvalidRequest(
                f"The prompt has {num_bytes} bytes; the context of {self._max_context} tokens "
                f"holds {self.max_bytes} at most. Shorten the prompt."
            )

    def _refuse_by_pieces(self, text: str) -> None:
        most = _CLEARLY_MORE * self._max_context
        num_tokens = 0
        for piece in _pieces(text):
            (encoding,) = self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            num_tokens += len(encoding)
            if num_tokens > most:
                raise InvalidRequest(
                    f"The prompt has more than {most} tokens; the context holds "
                    f"{self._max_context}. Shorten the prompt."
                )


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield text[start : start + _PIECE_CHARACTERS]


def refuse_length(num_tokens: int, max_context: int) -> None:
    """Raise InvalidRequest for a prompt that leaves no room for an answer."""
    if num_tokens >= max_context:
        raise InvalidRequest(
            f"The prompt has {num_tokens} tokens; the context holds {max_context}, and at least "
            "one must be left for the answer."
        )

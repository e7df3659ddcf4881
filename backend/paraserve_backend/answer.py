"""What a client gets of one request: text and token ids, streamed or all at once."""

from __future__ import annotations

from dataclasses import dataclass

from paraserve_backend.text import Detokenizer, StopWords


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One response. The last one of a request has a `finish_reason` and the counts."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    num_input_tokens: int
    num_output_tokens: int


class Answer:
    """Collects one sequence's tokens and says what to send when."""

    def __init__(
        self,
        *,
        detokenizer: Detokenizer,
        stop_words: StopWords,
        is_stream: bool,
        prefix: str,
        num_input_tokens: int,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_words = stop_words
        self._is_stream = is_stream
        self._num_input_tokens = num_input_tokens
        self._num_output_tokens = 0
        self._text = prefix
        self._token_ids: list[int] = []

    def add(self, token_id: int, finish_reason: str | None) -> Delta | None:
        """Take the newest token; `finish_reason` is set if the sequence ended with it.

        Returns:
            What to send now; `None` while an unstreamed answer is being collected.
        """
        self._num_output_tokens += 1
        self._token_ids.append(token_id)
        text, stopped = self._stop_words.add(self._detokenizer.add(token_id))
        self._text += text
        if not stopped and finish_reason is not None:
            text, stopped = self._stop_words.add(self._detokenizer.finish())
            self._text += text if stopped else text + self._stop_words.finish()
        reason = "stop" if stopped else finish_reason
        return self._take(reason) if self._is_stream or reason is not None else None

    def _take(self, finish_reason: str | None) -> Delta:
        delta = Delta(
            text=self._text,
            token_ids=tuple(self._token_ids),
            finish_reason=finish_reason,
            num_input_tokens=self._num_input_tokens,
            num_output_tokens=self._num_output_tokens,
        )
        self._text = ""
        self._token_ids.clear()
        return delta

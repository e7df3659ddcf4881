"""What a client gets of one request: text, tokens and log-probabilities, streamed or all at once.

It collects the tokens of one sequence and decides when to send what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.sampling import ChosenToken


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedToken:
    """A token that was or might have been chosen."""

    token_id: int
    logprob: float
    #: 1 for the likeliest token.
    rank: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One response. The last one of a request has a `finish_reason`."""

    text: str
    token_ids: tuple[int, ...]
    #: One per token.
    logprobs: tuple[float, ...]
    #: Where asked for, one per token: the token itself, then its likeliest rivals.
    ranked: tuple[tuple[RankedToken, ...], ...]
    finish_reason: str | None
    num_input_tokens: int
    #: Tokens of this response and those before it.
    num_output_tokens: int
    #: The sum over the same tokens.
    cumulative_logprob: float


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
        min_tokens: int = 0,
    ) -> None:
        """Begin before the first token.

        Args:
            detokenizer: makes text of the tokens.
            stop_words: end the answer, but not within its first `min_tokens` tokens.
            is_stream: every token is sent when it comes, instead of all together.
            prefix: text to send first.
            num_input_tokens: length of the prompt.
            min_tokens: length of the shortest answer.
        """
        self._detokenizer = detokenizer
        self._stop_words = stop_words
        self._is_stream = is_stream
        self._num_input_tokens = num_input_tokens
        self._min_tokens = min_tokens
        self._num_output_tokens = 0
        self._cumulative_logprob = 0.0
        #: So many characters that the detokenizer holds back are too early for a stop word.
        self._num_held_early = 0
        self._text = prefix
        self._tokens: list[ChosenToken] = []

    def add(self, token: ChosenToken, finish_reason: str | None) -> Delta | None:
        """Take the newest token; `finish_reason` is set if the sequence ended with it.

        Returns:
            What to send now; `None` while an unstreamed answer is being collected.
        """
        self._num_output_tokens += 1
        self._cumulative_logprob += token.logprob
        self._tokens.append(token)
        # A token that ends the sequence is no text, whether the tokenizer calls it special or not.
        stopped = finish_reason != "stop" and self._show(self._detokenizer.add(token.token_id))
        if not stopped and finish_reason is not None:
            stopped = self._show(self._detokenizer.finish())
            if not stopped:
                self._text += self._stop_words.finish()
        reason = "stop" if stopped else finish_reason
        return self._take(reason) if self._is_stream or reason is not None else None

    def replay(self, tokens: Iterable[ChosenToken]) -> None:
        """Take the tokens of a request that another replica has begun; what was sent stays sent."""
        for token in tokens:
            self.add(token, None)

    def _show(self, text: str) -> bool:
        early, late = self._split(text)
        stopped = False
        if early:
            shown, stopped = self._stop_words.add(early, may_stop=False)
            self._text += shown
        if late and not stopped:
            shown, stopped = self._stop_words.add(late)
            self._text += shown
        return stopped

    def _split(self, text: str) -> tuple[str, str]:
        """Part the text of tokens that may not end the answer from that of later ones."""
        if self._num_output_tokens <= self._min_tokens:
            if self._num_output_tokens == self._min_tokens:
                self._num_held_early = len(self._detokenizer.held())
            return text, ""
        early, late = text[: self._num_held_early], text[self._num_held_early :]
        self._num_held_early -= len(early)
        return early, late

    def _take(self, finish_reason: str | None) -> Delta:
        delta = Delta(
            text=self._text,
            token_ids=tuple(token.token_id for token in self._tokens),
            logprobs=tuple(token.logprob for token in self._tokens),
            ranked=tuple(self._ranked(token) for token in self._tokens if token.ranking),
            finish_reason=finish_reason,
            num_input_tokens=self._num_input_tokens,
            num_output_tokens=self._num_output_tokens,
            cumulative_logprob=self._cumulative_logprob,
        )
        self._text = ""
        self._tokens.clear()
        return delta

    def _ranked(self, token: ChosenToken) -> tuple[RankedToken, ...]:
        assert token.ranking is not None
        rivals = zip(token.ranking.token_ids, token.ranking.logprobs, strict=True)
        entries = [(token.ranking.rank, token.token_id, token.logprob)]
        entries += [
            (rank, token_id, logprob)
            for rank, (token_id, logprob) in enumerate(rivals, start=1)
            if token_id != token.token_id
        ]
        return tuple(
            RankedToken(
                token_id=token_id,
                logprob=logprob,
                rank=rank,
                text=self._detokenizer.token_text(token_id),
            )
            for rank, token_id, logprob in entries
        )

"""Turns a checked request into the sequence to run: token ids instead of text.

It owns what depends on the model: tokenizer, vocabulary, end tokens and context length. Prompts
that are too long and tokens that do not exist are refused here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.prompts import PromptTokenizer, refuse_length
from paraserve_backend.generation.sequence import History, TokenSequence
from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import Resume


@dataclass(frozen=True, kw_only=True)
class RequestEncoder:
    """Used by one thread at a time."""

    tokenizer: Tokenizer
    vocab_size: int
    #: The model's own end tokens, all within the vocabulary.
    end_ids: frozenset[int]
    #: Tokens of prompt and answer together.
    max_context: int

    @cached_property
    def _prompts(self) -> PromptTokenizer:
        return PromptTokenizer(self.tokenizer, self.max_context)

    def sequence(self, request: GenerateRequest) -> TokenSequence:
        """Return the sequence to run.

        Raises:
            InvalidRequest: the prompt is empty, too long, or a token is unknown.
        """
        prompt_ids = self._prompt_ids(request)
        end_ids = self._end_ids(request)
        needs_history = request.bad_words or request.min_tokens or request.sampling.steering
        return TokenSequence(
            prompt_ids=prompt_ids,
            sampling=request.sampling,
            history=self._history(request, prompt_ids, end_ids) if needs_history else None,
            max_tokens=min(request.max_tokens, self.max_context - len(prompt_ids)),
            end_ids=end_ids,
        )

    def resumed(self, request: GenerateRequest, resume: Resume) -> TokenSequence:
        """Return the sequence with the tokens it has got elsewhere.

        Raises:
            InvalidRequest: the request is not the one that was begun there.
        """
        sequence = self.sequence(request)
        sequence.max_tokens = min(sequence.max_tokens, resume.max_tokens)
        self._check_known([token.token_id for token in resume.tokens])
        for token in resume.tokens:
            sequence.append(token.token_id)
        if sequence.finish_reason is not None or sequence.num_tokens > self.max_context:
            raise InvalidRequest(
                "The request to go on with has ended, or is too long for this one."
            )
        return sequence

    def answer(self, request: GenerateRequest, prompt_ids: list[int]) -> Answer:
        return Answer(
            detokenizer=Detokenizer(self.tokenizer, prompt_ids),
            stop_words=StopWords(request.stop_words),
            is_stream=request.is_stream,
            prefix=self._echo(request, prompt_ids) if request.echo else "",
            num_input_tokens=len(prompt_ids),
            min_tokens=request.min_tokens,
        )

    def _prompt_ids(self, request: GenerateRequest) -> list[int]:
        if request.input_ids is not None:
            ids = list(request.input_ids)
        else:
            ids = self._prompts.ids(request.text or "")
        if not ids:
            raise InvalidRequest("The prompt is empty; give 'text_input' at least one token.")
        refuse_length(len(ids), self.max_context)
        self._check_known(ids)
        return ids

    def _end_ids(self, request: GenerateRequest) -> frozenset[int]:
        end_ids = self.end_ids
        if request.end_id is not None:
            end_ids = frozenset() if request.end_id < 0 else frozenset({request.end_id})
        if request.ignore_eos:
            end_ids = frozenset()
        end_ids = end_ids.union(request.stop_token_ids)
        self._check_known(end_ids)
        return end_ids

    def _history(
        self, request: GenerateRequest, prompt_ids: list[int], end_ids: frozenset[int]
    ) -> History:
        return History(
            request.sampling,
            prompt_ids,
            bad_words=self._bad_words(request.bad_words),
            end_ids=end_ids,
            min_tokens=request.min_tokens,
        )

    def _bad_words(self, words: tuple[str, ...]) -> set[tuple[int, ...]]:
        """Return the words as tokens, as they begin a text and as they follow a space."""
        spellings = [spelling for word in words for spelling in (word, f" {word}")]
        encoded = self.tokenizer.encode_batch_fast(spellings, add_special_tokens=False)
        # A tokenizer may know more tokens than the model can choose.
        return {tuple(e.ids) for e in encoded if e.ids and max(e.ids) < self.vocab_size}

    def _check_known(self, ids: Collection[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise InvalidRequest(f"Token ids must be in [0, {self.vocab_size}).")

    def _echo(self, request: GenerateRequest, prompt_ids: list[int]) -> str:
        if request.text is not None:
            return request.text
        # As a batch: that keeps no other thread waiting for Python's lock.
        (text,) = self.tokenizer.decode_batch([prompt_ids])
        return text

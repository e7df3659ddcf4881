"""One request while it generates: its tokens, its KV blocks, its progress and when it ends.

What sampling must know of its past (penalties, bad words, least length) is followed here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from paraserve_backend.protocol.sampling import Sampling, Steering

#: Steering that changes nothing.
_NEUTRAL = Steering()


class History:
    """Follows one sequence, token by token."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        *,
        bad_words: Iterable[tuple[int, ...]] = (),
        end_ids: Iterable[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """Begin after the prompt.

        Args:
            sampling: how to choose tokens; its `banned_ids`, `seen_ids` and `seen_counts` are empty
                and will be filled in.
            prompt_ids: penalties and bad words take the prompt into account.
            bad_words: token sequences that must not come to their end.
            end_ids: tokens that must not come among the first `min_tokens`; none of them is a bad
                word by itself, or the answer could not end.
            min_tokens: length of the shortest answer.
        """
        words = set(bad_words)
        self._sampling = sampling
        self._end_ids = tuple(sorted(end_ids))
        lone_ids = {word[0] for word in words if len(word) == 1}
        self._always_banned = tuple(sorted(lone_ids.difference(self._end_ids)))
        self._phrases = sorted(word for word in words if len(word) > 1)
        self._recent = deque(prompt_ids, maxlen=max(map(len, self._phrases), default=1) - 1)
        self._num_missing = min_tokens
        self._seen = _seen(sampling.steering or _NEUTRAL, prompt_ids)

    def append(self, token_id: int) -> None:
        """Take in the newest token."""
        self._num_missing -= 1
        self._recent.append(token_id)
        if self._seen is not None:
            self._seen[token_id] = self._seen.get(token_id, 0) + 1

    def sampling(self) -> Sampling:
        """Return how to choose the next token."""
        banned = tuple(dict.fromkeys(self._banned()))
        if not banned and not self._seen:
            return self._sampling
        seen = self._seen or {}
        steering = replace(
            self._sampling.steering or _NEUTRAL,
            banned_ids=banned,
            seen_ids=tuple(seen),
            seen_counts=tuple(seen.values()),
        )
        return replace(self._sampling, steering=steering)

    def _banned(self) -> Iterator[int]:
        yield from self._always_banned
        if self._num_missing > 0:
            yield from self._end_ids
        recent = tuple(self._recent) if self._phrases else ()
        for phrase in self._phrases:
            if recent[-len(phrase) + 1 :] == phrase[:-1]:
                yield phrase[-1]


def _seen(steering: Steering, prompt_ids: Sequence[int]) -> dict[int, int] | None:
    """How often each token was generated, for penalties; `None` where there are none."""
    if steering.repetition_penalty != 1.0:
        return dict.fromkeys(prompt_ids, 0)
    # The other penalties look at generated tokens alone.
    return {} if steering.presence_penalty or steering.frequency_penalty else None


@dataclass(slots=True, kw_only=True, eq=False)
class TokenSequence:
    """Owned by the batcher; others only read it."""

    prompt_ids: list[int]
    #: How to choose its tokens, where those so far do not matter.
    sampling: Sampling
    #: Set where they do.
    history: History | None = None
    max_tokens: int
    #: Token ids that end the sequence.
    end_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    #: Positions `[0, num_computed)` are in the KV cache.
    num_computed: int = 0
    in_flight: bool = False
    #: On its way to another replica: no pass runs with it.
    is_held: bool = False
    #: "stop" (an end token or stop word), "length"; `None` while it runs.
    finish_reason: str | None = None
    #: Cancelled, stopped or failed: it leaves as soon as it is not in flight.
    is_dropped: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return self.num_tokens - self.num_computed

    def ids(self, start: int, end: int) -> list[int]:
        """Return token ids of positions `[start, end)`."""
        prompt_length = len(self.prompt_ids)
        if start >= prompt_length:
            return self.output_ids[start - prompt_length : end - prompt_length]
        return self.prompt_ids[start:end] + self.output_ids[: max(0, end - prompt_length)]

    def next_sampling(self) -> Sampling:
        """Return how to choose the token after those it has."""
        return self.sampling if self.history is None else self.history.sampling()

    def append(self, token_id: int) -> None:
        self.output_ids.append(token_id)
        if self.history is not None:
            self.history.append(token_id)
        if token_id in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.max_tokens:
            self.finish_reason = "length"

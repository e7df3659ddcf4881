"""What a sequence's tokens so far mean for its next one: penalties, bad words, the shortest answer.

It lives beside the sequence in the generate loop and goes to the last stage row by row, so it
outlives preemption. It follows from the request and the token ids alone: whoever has those can
build it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from paraserve_backend.protocol.forward import Sampling, Steering

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

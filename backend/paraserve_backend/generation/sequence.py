"""One request while it generates: its tokens, its KV blocks and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from paraserve_backend.generation.history import History
from paraserve_backend.protocol.forward import Sampling


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
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

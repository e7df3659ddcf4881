"""How far a request had come when it left its replica: all that the next replica needs besides it.

Encoded as text, because it travels as a request parameter.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.forward_codec import decode_result, encode_result
from paraserve_backend.protocol.sampling import ChosenToken

#: Request parameter with an encoded `Resume`; also an output of the response that moves a request.
#: Whoever sends one can follow the request to another replica.
RESUME = "resume"
#: Output of that response: the replica that takes the request over.
HAND_OVER_TO = "hand_over_to"

# version, ticket, seed, max_tokens, whether every token has a ranking
_HEADER = struct.Struct("<BQQI?")
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    #: What the target knows its KV blocks by; 0: it has none.
    ticket: int = 0
    #: Of every draw, whether the client chose it or not.
    seed: int
    #: The limit of the first replica, which may have been the context's.
    max_tokens: int
    #: So far, oldest first.
    tokens: tuple[ChosenToken, ...]

    def encode(self) -> str:
        # Those that a gateway has told of after a loss have none. They were sent, and so were all
        # others of theirs: nobody needs the rankings that there are.
        rankings = tuple(token.ranking for token in self.tokens if token.ranking)
        is_ranked = bool(rankings) and len(rankings) == len(self.tokens)
        progress = ForwardResult(
            token_ids=tuple(token.token_id for token in self.tokens),
            logprobs=tuple(token.logprob for token in self.tokens),
            rankings=rankings if is_ranked else (),
        )
        header = _HEADER.pack(_VERSION, self.ticket, self.seed, self.max_tokens, is_ranked)
        return base64.b64encode(header + encode_result(progress)).decode()

    @staticmethod
    def has_begun(text: str) -> bool:
        """Tell, without decoding it, whether an encoded one has tokens."""
        return len(text) > _CHARACTERS_WITHOUT_TOKENS

    @classmethod
    def decode(cls, text: str) -> Resume:
        """Reverse `encode`.

        Raises:
            InvalidRequest: it is not something `encode` has made.
        """
        try:
            raw = base64.b64decode(text, validate=True)
            version, ticket, seed, max_tokens, is_ranked = _HEADER.unpack_from(raw)
            progress = decode_result(raw[_HEADER.size :])
            if version != _VERSION or len(progress.rankings) != is_ranked * len(progress.token_ids):
                raise ValueError("another version, or rankings that fit no tokens")
        except (ValueError, struct.error, binascii.Error):
            raise InvalidRequest(
                f"Parameter '{RESUME}' is not one that a ParaServe replica has made."
            ) from None
        tokens = tuple(_tokens(progress))
        return cls(ticket=ticket, seed=seed, max_tokens=max_tokens, tokens=tokens)


_CHARACTERS_WITHOUT_TOKENS = len(Resume(seed=0, max_tokens=1, tokens=()).encode())


def _tokens(progress: ForwardResult) -> Iterator[ChosenToken]:
    rankings = progress.rankings or (None,) * len(progress.token_ids)
    entries = zip(progress.token_ids, progress.logprobs, rankings, strict=True)
    for token_id, logprob, ranking in entries:
        yield ChosenToken(token_id=token_id, logprob=logprob, ranking=ranking)

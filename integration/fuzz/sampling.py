"""Random settings through the request's parser, the encoder, a sequence's history and the sampler.

What a gateway lets through reaches a replica, and clients may call a replica directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch

from integration.fuzz.bodies import python_value, setting_name
from integration.fuzz.target import REFUSALS, Case, WrongAnswer
from paraserve_backend.engines.native.model.sampler import sample
from paraserve_backend.generation.encoder import RequestEncoder
from paraserve_backend.protocol.request import GenerateRequest, parse_request
from paraserve_backend.protocol.sampling import ChosenToken
from paraserve_backend.protocol.tensors import INPUTS, TensorSpec
from tests.support.odd_tokenizers import all_kinds

_MAX_CONTEXT = 64
_MAX_TOKENS = 8
_TEXTS = ("hi", "a", "Hello ▁", "好🌶", "", "\0", "x" * 4000, " ", "<s>", "</s> e")
_INTEGERS = (0, 1, -1, 2, 3, 5, 20, 63, 2**31 - 1)
_NUMBERS = (0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, 3.4e38, 2.0, 0.01, float("nan"), float("inf"))


class SamplingParameters:
    name = "sampling"

    def __init__(self) -> None:
        self._encoders = [
            RequestEncoder(
                tokenizer=kind.tokenizer,
                # Models have more, or fewer, tokens than their tokenizers.
                vocab_size=kind.tokenizer.get_vocab_size() + extra,
                end_ids=frozenset({1}),
                max_context=_MAX_CONTEXT,
            )
            for kind, extra in zip(all_kinds(), (0, 40, -5, 0, 64, 0), strict=True)
        ]

    def case(self, rng: Random) -> Case:
        number = rng.randrange(len(self._encoders))
        tensors, parameters = _tensors(rng), _parameters(rng)
        noise = rng.randrange(2**31)

        async def run() -> None:
            try:
                request = parse_request(tensors, parameters, fresh_seed=noise)
                _generate(self._encoders[number], request, noise)
            except REFUSALS:
                pass

        return Case(shown=f"tokenizer={number} {tensors!r} {parameters!r} noise={noise}", run=run)


def _generate(encoder: RequestEncoder, request: GenerateRequest, noise: int) -> None:
    """Draw the answer's tokens from random scores, as a replica does from a model's."""
    sequence = encoder.sequence(request)
    answer = encoder.answer(request, sequence.prompt_ids)
    scores = torch.Generator().manual_seed(noise)
    for _ in range(_MAX_TOKENS):
        logits = torch.randn((1, encoder.vocab_size), generator=scores) * 4
        result = sample(logits, [sequence.next_sampling()], [sequence.num_tokens])
        token = ChosenToken(
            token_id=result.token_ids[0],
            logprob=result.logprobs[0],
            ranking=result.rankings[0] if result.rankings else None,
        )
        if not 0 <= token.token_id < encoder.vocab_size:
            raise WrongAnswer(f"token {token.token_id} of {encoder.vocab_size}")
        sequence.append(token.token_id)
        delta = answer.add(token, sequence.finish_reason)
        if delta is not None and delta.finish_reason is not None:
            return


def _tensors(rng: Random) -> Mapping[str, Sequence[Any]]:
    specs = {spec.name: spec for spec in INPUTS}
    names = [rng.choice(("text_input", "text_input", "input_ids"))] if rng.random() < 0.95 else []
    names += [rng.choice(INPUTS).name for _ in range(rng.choice((0, 1, 3, 6)))]
    return {name: _elements(rng, specs[name]) for name in names}


def _elements(rng: Random, spec: TensorSpec) -> Sequence[Any]:
    count = rng.choice((1, 1, 1, 1, 0, 2, 70)) if spec.shape == (-1,) or rng.random() < 0.02 else 1
    return [_element(rng, spec.datatype) for _ in range(count)]


def _element(rng: Random, datatype: str) -> Any:
    if datatype == "BOOL":
        return rng.random() < 0.5
    if datatype == "FP32":
        return rng.choice(_NUMBERS)
    if datatype == "BYTES":
        return rng.choice(_TEXTS).encode() if rng.random() < 0.97 else rng.randbytes(5)
    return max(0, rng.choice(_INTEGERS)) if datatype.startswith("U") else rng.choice(_INTEGERS)


def _parameters(rng: Random) -> Mapping[str, Any]:
    return {setting_name(rng): python_value(rng) for _ in range(rng.choice((0, 0, 1, 2)))}

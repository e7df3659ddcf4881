"""One generate request, parsed and checked: defaults, ranges, and what is not supported.

Settings of vLLM's and of TensorRT-LLM's clients are understood (docs/protocol.md). A request is
parsed twice on purpose. The gateway parses it so that a bad request wakes no model. The replica
parses it again because it must not trust what reaches it: clients may call it directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.names import COMMAND_PARAMETER, OWN_PREFIX
from paraserve_backend.protocol.request_settings import (
    INT32_MAX,
    SAMPLING_PARAMETERS,
    Settings,
    show,
    text,
)
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME
from paraserve_backend.protocol.sampling import Sampling, Steering

_DEFAULT_MAX_TOKENS = 16  # as vLLM's
_SEED_MAX = 2**64 - 1
#: As vLLM's; a larger number would make every response as large as the vocabulary.
_MAX_LOGPROBS = 20
#: Wide enough for any use, narrow enough that no score overflows.
_MIN_REPETITION_PENALTY, _MAX_REPETITION_PENALTY = 0.01, 100.0
#: OpenAI's range.
_MAX_PENALTY = 2.0
#: Names that a client may give to nothing, besides those that begin with `OWN_PREFIX`.
_RESERVED = frozenset({COMMAND_PARAMETER, RESUME, HAND_OVER_TO})


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedOutputs:
    """What every response shall hold besides text and token ids."""

    finish_reason: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    cumulative_logprob: bool = False
    #: vLLM's JSON: each token with its rank, and its likeliest rivals.
    logprobs: bool = False
    #: TensorRT-LLM's two tensors: the sum so far, and each token's own.
    log_probs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    #: Text to continue, or token ids; exactly one is set, but in a gateway that has checked it.
    text: str | None
    input_ids: tuple[int, ...] | None
    sampling: Sampling
    max_tokens: int
    min_tokens: int = 0
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    #: Replaces the model's own end tokens; -1 is no token.
    end_id: int | None = None
    #: End the answer besides the end tokens, also when those are ignored.
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    is_stream: bool = False
    echo: bool = False
    wanted: WantedOutputs = WantedOutputs()


#: Settings that are taken at their default alone, with that default and what else they ask for.
UNSUPPORTED: Mapping[str, tuple[object, str]] = {
    "beam_width": (1, "beam search"),
    "use_beam_search": (False, "beam search"),
    "early_stopping": (False, "beam search"),
    "n": (1, "several answers"),
    "best_of": (1, "several answers"),
    "num_return_sequences": (1, "several answers"),
    "return_context_logits": (False, "logits"),
    "return_generation_logits": (False, "logits"),
    "prompt_logprobs": (None, "log-probabilities of the prompt"),
    "return_perf_metrics": (False, "performance metrics of one request"),
    "num_draft_tokens": (0, "speculative decoding"),
    "use_draft_logits": (False, "speculative decoding"),
    "guided_decoding": (None, "guided decoding"),
    "guided_decoding_guide": (None, "guided decoding"),
    "guided_decoding_guide_type": (None, "guided decoding"),
    "structured_outputs": (None, "guided decoding"),
    "logits_processors": (None, "a logits processor"),
    "logit_bias": (None, "a bias of single tokens"),
    "embedding_bias_words": (None, "a bias of single tokens"),
    "embedding_bias_weights": (None, "a bias of single tokens"),
    "allowed_token_ids": (None, "a choice among given tokens"),
    "lora_name": (None, "a LoRA adapter"),
    "lora_task_id": (None, "a LoRA adapter"),
    "lora_weights": (None, "a LoRA adapter"),
    "lora_config": (None, "a LoRA adapter"),
    "prompt_embedding_table": (None, "prompt tuning"),
    "prompt_vocab_size": (None, "prompt tuning"),
    "prompt_table_extra_id": (None, "prompt tuning"),
    "image": (None, "an image"),
    "image_input": (None, "an image"),
    "image_bytes_input": (None, "an image"),
    "image_url_input": (None, "an image"),
    "video_bytes_input": (None, "a video"),
    "decoder_text_input": (None, "an encoder-decoder model"),
    "embedding_request": (None, "an embedding"),
    "truncate_prompt_tokens": (None, "a shorter prompt"),
    "include_stop_str_in_output": (False, "stop words in the text"),
    "skip_special_tokens": (True, "special tokens in the text"),
    "spaces_between_special_tokens": (True, "special tokens in the text"),
    "detokenize": (True, "no text"),
}


def parse_request(
    tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], *, fresh_seed: int
) -> GenerateRequest:
    """Read a request. `tensors` holds each input's elements, flat.

    Raises:
        InvalidRequest: a setting is malformed, out of range or unsupported; the sentence names it.
    """
    return _read(Settings(tensors, parameters), *_prompt(tensors), fresh_seed)


def _read(
    settings: Settings, prompt_text: str | None, input_ids: tuple[int, ...] | None, fresh_seed: int
) -> GenerateRequest:
    wanted = _wanted(settings)
    max_tokens = settings.integer("max_tokens", default=_DEFAULT_MAX_TOKENS, low=1)
    request = GenerateRequest(
        text=prompt_text,
        input_ids=input_ids,
        sampling=_sampling(settings, wanted, fresh_seed),
        max_tokens=max_tokens,
        min_tokens=_min_tokens(settings, max_tokens),
        stop_words=settings.words("stop_words", "stop"),
        bad_words=settings.words("bad_words"),
        end_id=settings.optional_integer("end_id", low=-1),
        stop_token_ids=settings.token_ids("stop_token_ids"),
        ignore_eos=settings.flag("ignore_eos", default=False),
        is_stream=settings.flag("stream", default=False),
        echo=not settings.flag("exclude_input_in_output", default=True),
        wanted=wanted,
    )
    _check_without_effect(settings)
    settings.require_known()
    return request


def refuse_unsupported(name: str) -> None:
    """Raise InvalidRequest for a name of `UNSUPPORTED`."""
    _, what = UNSUPPORTED[name]
    raise InvalidRequest(f"'{name}' asks for {what}, which is not supported; leave it out.")


def refuse_reserved(name: str) -> None:
    """Raise InvalidRequest if parameters or tensors of that name are between our own processes."""
    if name in _RESERVED or name.startswith(OWN_PREFIX):
        raise InvalidRequest(
            f"The name {show(name)} is reserved for ParaServe's own processes; leave it out."
        )


def _prompt(
    tensors: Mapping[str, Sequence[Any]],
) -> tuple[str | None, tuple[int, ...] | None]:
    if "input_ids" in tensors and "text_input" in tensors:
        raise InvalidRequest("Give either 'text_input' or 'input_ids', not both.")
    if "input_ids" in tensors:
        ids = tuple(int(value) for value in tensors["input_ids"])
        if not ids:
            raise InvalidRequest("Input 'input_ids' is empty; give at least one token.")
        return None, ids
    if len(tensors.get("text_input", ())) != 1:
        raise InvalidRequest("Input 'text_input' is missing; it takes exactly one string.")
    return text(tensors["text_input"][0], "text_input"), None


def _sampling(settings: Settings, wanted: WantedOutputs, fresh_seed: int) -> Sampling:
    # vLLM writes -1 for "off".
    top_k = max(0, settings.integer("top_k", default=0, low=-1))
    top_p = settings.number("top_p", default=1.0, low=0.0, high=1.0)
    steering = _steering(settings, wanted)
    # Clients of both backends mean to sample when they set a filter and no temperature.
    is_filtered = top_k > 0 or top_p < 1.0 or steering.min_p > 0.0
    seed = settings.optional_integer("seed", "random_seed", low=-1, high=_SEED_MAX)
    return Sampling(
        temperature=settings.number("temperature", default=float(is_filtered), low=0.0),
        top_k=top_k,
        top_p=top_p,
        # vLLM writes -1 for "none".
        seed=fresh_seed if seed is None or seed < 0 else seed,
        steering=None if steering == Steering() else steering,
    )


def _steering(settings: Settings, wanted: WantedOutputs) -> Steering:
    # OpenAI's chat clients write false for "none".
    num_logprobs = None
    if settings.find("logprobs") is not False:
        num_logprobs = settings.optional_integer("logprobs", low=0, high=_MAX_LOGPROBS)
    return Steering(
        min_p=settings.number("min_p", default=0.0, low=0.0, high=1.0),
        repetition_penalty=settings.number(
            "repetition_penalty",
            default=1.0,
            low=_MIN_REPETITION_PENALTY,
            high=_MAX_REPETITION_PENALTY,
        ),
        presence_penalty=_penalty(settings, "presence_penalty"),
        frequency_penalty=_penalty(settings, "frequency_penalty"),
        num_logprobs=num_logprobs if wanted.logprobs else None,
    )


def _penalty(settings: Settings, name: str) -> float:
    return settings.number(name, default=0.0, low=-_MAX_PENALTY, high=_MAX_PENALTY)


def _min_tokens(settings: Settings, max_tokens: int) -> int:
    min_tokens = settings.integer("min_tokens", "min_length", default=0, low=0)
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {min_tokens}; it must be at most 'max_tokens', {max_tokens}."
        )
    return min_tokens


def _wanted(settings: Settings) -> WantedOutputs:
    def flag(name: str) -> bool:
        return settings.flag(f"return_{name}", default=False)

    return WantedOutputs(
        finish_reason=flag("finish_reason"),
        num_input_tokens=flag("num_input_tokens"),
        num_output_tokens=flag("num_output_tokens"),
        cumulative_logprob=flag("cumulative_logprob"),
        logprobs=flag("logprobs"),
        log_probs=flag("log_probs"),
    )


def _check_without_effect(settings: Settings) -> None:
    # Padding is not needed, and the length penalty belongs to beam search.
    settings.integer("pad_id", default=0, low=-1 - INT32_MAX)
    settings.number("length_penalty", default=1.0)
    for name, (default, _) in UNSUPPORTED.items():
        if settings.differs(name, default):
            refuse_unsupported(name)


def _setting_names() -> frozenset[str]:
    settings = Settings({}, {})
    _read(settings, "", None, 0)
    return settings.asked_for | {SAMPLING_PARAMETERS}


#: Every setting that a request parameter may be, by every name that it goes by.
SETTINGS = _setting_names()

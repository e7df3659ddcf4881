"""Runs in the environment of KServe's client: asks or looks as its one argument says, in JSON.

    kserve_client.py '{"protocol": "grpc", "url": …, "deployment": …, "prompt": …, "max_tokens": …}'

Without a prompt it looks. Prints a line of JSON; if it is refused, the client's exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from kserve import (  # type: ignore[import-not-found]
    InferenceGRPCClient,
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)

Json = dict[str, Any]


async def main(wanted: Json) -> None:
    logging.disable()  # the client logs what it raises
    act = ask if "prompt" in wanted else look
    try:
        sys.stdout.write(json.dumps(await act(wanted)) + "\n")
    except Exception as error:
        sys.exit(str(error))


async def ask(wanted: Json) -> Json:
    request = InferRequest(
        model_name=wanted["deployment"],
        infer_inputs=[
            _input("text_input", "BYTES", np.array([wanted["prompt"].encode()], dtype=np.object_)),
            _input("max_tokens", "INT32", np.array([wanted["max_tokens"]], dtype=np.int32)),
        ],
    )
    if wanted["protocol"] == "grpc":
        async with InferenceGRPCClient(wanted["url"]) as client:
            response = await client.infer(request)
    else:
        async with _rest_client() as client:
            response = await client.infer(wanted["url"], request, model_name=request.model_name)
    outputs = {output.name: output.as_numpy().tolist() for output in response.outputs}
    (text,) = outputs["text_output"]
    # Bytes by gRPC, str by REST.
    return {
        "token_ids": outputs["output_ids"],
        "text": text.decode() if isinstance(text, bytes) else text,
    }


async def look(wanted: Json) -> Json:
    if wanted["protocol"] == "grpc":
        async with InferenceGRPCClient(wanted["url"]) as client:
            return await _look(client, (), wanted)
    async with _rest_client() as client:
        return await _look(client, (wanted["url"],), wanted)


async def _look(client: Any, where: tuple[str, ...], wanted: Json) -> Json:
    return {
        "is_server_live": await client.is_server_live(*where),
        "is_server_ready": await client.is_server_ready(*where),
        "is_deployment_ready": await client.is_model_ready(*where, wanted["deployment"]),
        "is_unknown_ready": await client.is_model_ready(*where, wanted["unknown"]),
    }


@contextlib.asynccontextmanager
async def _rest_client() -> AsyncIterator[Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    try:
        yield client
    finally:
        await client.close()


def _input(name: str, datatype: str, values: np.ndarray[Any, Any]) -> Any:
    tensor = InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))

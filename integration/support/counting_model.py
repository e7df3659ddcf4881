"""A decoupled Triton model with a deployment's interface and no language model: it counts."""

from __future__ import annotations

from pathlib import Path

from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS, TensorSpec

# What it does is the prompt: count, as fast as it can or at a pace, hang, fail, or report that
# another request was cancelled.
_MODEL = """
import json
import threading
import time
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

class TritonPythonModel:
    def initialize(self, args):
        self.cancelled = threading.Event()

    def execute(self, requests):
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy().tolist() for tensor in request.inputs()}
            if tensors["text_input"] == [b"raise"]:
                raise ValueError("boom")
            work = (request.get_response_sender(), tensors, json.loads(request.parameters()))
            threading.Thread(target=self.answer, args=work, daemon=True).start()

    def answer(self, sender, tensors, parameters):
        prompt = tensors["text_input"][0].decode()
        if prompt == "was cancelled":
            self.send(sender, str(self.cancelled.wait(600)), 1, last=True)
        elif prompt == "parameters":
            parameters.pop("triton_enable_empty_final_response", None)
            parameters.pop("resume", None)  # a gateway's
            parameters.pop("paraserve_replica", None)  # a gateway's too
            parameters.pop("id", None)  # only Triton's own HTTP service makes it a parameter
            self.send(sender, json.dumps(parameters, sort_keys=True), 1, last=True)
        elif prompt.startswith("fail"):
            # As ours do, the model says its code in the text.
            error = pb_utils.TritonError(f"{prompt.split()[1]}: The sentence.")
            sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
        elif prompt == "hang":
            while not sender.is_cancelled():
                self.send(sender, "tick", 1)
                self.cancelled.wait(0.01)
            self.cancelled.set()
            sender.send(flags=FINAL)
        elif prompt.startswith("pace"):
            self.count(sender, tensors, pace_s=float(prompt.split()[1]) / 1e3)
        else:
            self.count(sender, tensors, ends_empty=prompt == "end empty")

    def count(self, sender, tensors, ends_empty=False, pace_s=0.0):
        limit = tensors.get("max_tokens", [1])[0]
        start_s = time.monotonic()
        for number in range(limit):
            if pace_s:  # by the clock, so that a late token does not delay the next
                time.sleep(max(0.0, start_s + number * pace_s - time.monotonic()))
            last = number == limit - 1 and not ends_empty
            self.send(sender, f"token {number}", number + 1, last=last)
        if ends_empty:
            sender.send(flags=FINAL)

    def send(self, sender, text, count, last=False):
        outputs = [
            pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_)),
            pb_utils.Tensor("num_output_tokens", np.array([count], dtype=np.uint32)),
            pb_utils.Tensor("output_ids", np.arange(2, dtype=np.int32)),
        ]
        sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL if last else 0)
"""


def paced(interval_ms: float) -> str:
    """Return the prompt that makes it count one token per interval."""
    return f"pace {interval_ms:g}"


def write_model(folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
    inputs = ",".join(_declared(spec, "optional: true") for spec in INPUTS)
    outputs = ",".join(_declared(spec) for spec in OUTPUTS)
    config = f"""
        backend: "python" max_batch_size: 0 model_transaction_policy {{ decoupled: true }}
        input [{inputs}] output [{outputs}] instance_group [{{ kind: KIND_CPU count: 1 }}]
    """
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")


def _declared(spec: TensorSpec, more: str = "") -> str:
    dims = ", ".join(map(str, spec.shape))
    return f'{{ name: "{spec.name}" data_type: {spec.config_datatype} dims: [{dims}] {more} }}'

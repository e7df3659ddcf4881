"""Role `stage`: forward passes over a range of layers, and the KV blocks of those layers.

The first stage is fed by the head's ensemble, later ones by the activation channel; each can also
be called through Triton alone. A stage keeps no scheduling state.
"""

from __future__ import annotations

import logging
import threading

import numpy as np
import numpy.typing as npt

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.mailbox import Post
from paraserve_backend.channel.transport import Channel, Frame, FrameKind, relay
from paraserve_backend.daemon.guard import concerns_one
from paraserve_backend.engines.native.model.kv_transfer import KvExporter
from paraserve_backend.engines.native.model.load import load_engine
from paraserve_backend.engines.native.model.stage import Output
from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_backend.protocol.forward import Export, ForwardBatch, ForwardResult
from paraserve_backend.protocol.forward_codec import decode_batch, encode_result
from paraserve_backend.protocol.parameters import ChannelConfig, StageConfig
from paraserve_backend.roles.weights import Fetched, read_spec

logger = logging.getLogger(__name__)
#: Largest frame a stage takes: the hidden states of the largest batch, and its block tables.
_MAX_FRAME_BYTES = 1 << 30


class StageRole:
    def __init__(self, config: StageConfig, fetched: Fetched) -> None:
        self._fetched = fetched
        self._layers = config.layers
        self._engine = load_engine(
            fetched.reader,
            fetched.spans,
            spec=read_spec(fetched),
            layers=config.layers,
            kv=config.kv,
            device=config.device,
        )
        self._post = Post(CurveKeys.read(config.key_file)) if config.key_file else None
        # Triton's thread and the channel's may both ask for a pass.
        self._lock = threading.Lock()
        self._relay = _Relay(config.channel, self) if config.channel else None

    def step(self, batch: bytes, inputs: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
        """Run one forward pass asked for through Triton.

        Args:
            batch: an encoded ForwardBatch.
            inputs: token ids INT32 [tokens] for the first stage, else hidden states as bytes,
                UINT8 [tokens, hidden_size * bytes per element].

        Returns:
            Hidden states as bytes in the same form, or an encoded ForwardResult.
        """
        output = self.run(decode_batch(batch), inputs)
        if isinstance(output, ForwardResult):
            return np.frombuffer(encode_result(output), np.uint8)
        return output

    def run(self, batch: ForwardBatch, inputs: memoryview | npt.NDArray[np.generic]) -> Output:
        """Run one forward pass; `inputs` are those of `step`."""
        with self._lock:
            output = self._engine.step_raw(batch, inputs)
            if batch.exports:
                self._send(batch.exports)
            return output

    def _send(self, exports: tuple[Export, ...]) -> None:
        if self._post is None:
            raise InvalidRequest("A stage without parameter 'key_file' cannot send KV blocks.")
        KvExporter(self._engine.model.kv_cache, self._layers, self._post.send).send(exports)

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()
        if self._post is not None:
            self._post.close()
        self._fetched.close()


class _Relay:
    """Feeds a stage from the activation channel, on a thread of its own."""

    def __init__(self, config: ChannelConfig, stage: StageRole) -> None:
        self._stage = stage
        self._stopping = threading.Event()
        self._channel = Channel(
            listen=config.listen,
            next_address=config.next,
            keys=CurveKeys.read(config.key_file),
            max_bytes=_MAX_FRAME_BYTES,
        )
        self._thread = threading.Thread(
            target=relay,
            args=(self._channel, self._step, self._stopping.is_set),
            name="stage-relay",
            daemon=True,
        )
        self._thread.start()

    def _step(self, frame: Frame) -> Frame:
        try:
            return self._run(frame)
        except ParaServeError as error:
            return _error_frame(frame, str(error))
        except BaseException as error:
            if not concerns_one(error):
                raise
            logger.error("a forward pass failed", exc_info=error)
            return _error_frame(frame, "A forward pass failed; see the server's log.")

    def _run(self, frame: Frame) -> Frame:
        batch = decode_batch(frame.body)
        output = self._stage.run(batch, memoryview(frame.payload))
        if isinstance(output, ForwardResult):
            return Frame(kind=FrameKind.RESULT, number=frame.number, body=encode_result(output))
        # The batch goes on as it came: the stages all see the same block tables.
        payload = output.data.cast("B")
        return Frame(kind=frame.kind, number=frame.number, body=frame.body, payload=payload)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._channel.close()


def _error_frame(frame: Frame, message: str) -> Frame:
    return Frame(kind=FrameKind.ERROR, number=frame.number, body=message.encode())

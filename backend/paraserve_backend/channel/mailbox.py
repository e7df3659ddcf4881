"""A replica's connection to the other replicas of its deployment: a thread for what comes in, and a
sender for what goes out.

It decides nothing: messages go to the generate loop, KV blocks to the hand-over's target.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.messages import from_frame, to_frame
from paraserve_backend.channel.transport import Inbox, Outbox
from paraserve_backend.daemon.guard import guarded
from paraserve_backend.errors import InvalidRequest, Unavailable
from paraserve_backend.protocol.hand_over import (
    Expect,
    KvBlocks,
    LoopMessage,
    Message,
)
from paraserve_backend.protocol.parameters import HandOverConfig

logger = logging.getLogger(__name__)
#: Bounds one part of a frame.
_MAX_BYTES = 1 << 30
#: KV blocks of whole sequences may wait for a slow network: they take no more than the cache does.
_QUEUED_FRAMES = 10_000


class Mailbox:
    def __init__(self, config: HandOverConfig) -> None:
        keys = CurveKeys.read(config.key_file)
        self.address = config.inbox
        self._post = Post(keys)
        self._inbox = Inbox(listen=config.inbox, keys=keys, max_bytes=_MAX_BYTES)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(
        self,
        receive: Callable[[LoopMessage], None],
        receive_blocks: Callable[[KvBlocks | Expect], None],
    ) -> None:
        """Begin to listen; both are called from a thread of the mailbox."""
        self._thread = threading.Thread(
            target=self._run, args=(receive, receive_blocks), name="mailbox", daemon=True
        )
        self._thread.start()

    def send(self, address: str, message: Message) -> None:
        """Queue a message for an inbox without waiting."""
        self._post.send(address, message)

    def stop(self) -> None:
        """Listen no more; what is sent still goes out."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        self._inbox.close()
        self._post.close()

    def _run(
        self,
        receive: Callable[[LoopMessage], None],
        receive_blocks: Callable[[KvBlocks | Expect], None],
    ) -> None:
        while not self._stopping.is_set():
            frame = self._inbox.receive()
            if frame is None:
                continue
            with guarded(logger, "a message of another replica"):
                try:
                    message = from_frame(frame)
                    if isinstance(message, KvBlocks | Expect):
                        receive_blocks(message)
                    else:
                        receive(message)
                except (ValueError, InvalidRequest) as error:
                    # The sender gets no answer and keeps its sequence.
                    logger.warning("a message of another replica was refused: %s", error)


class NoMailbox:
    """Of a replica that stands alone."""

    address = ""

    def start(self, _receive: object, _receive_blocks: object) -> None:
        pass

    def send(self, _address: str, _message: Message) -> None:
        raise AssertionError("a replica without an address is offered nothing")

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_mailbox(config: HandOverConfig | None) -> Mailbox | NoMailbox:
    """Bind the inbox that the configuration names.

    Raises:
        InvalidRequest: the key file is malformed.
    """
    return NoMailbox() if config is None else Mailbox(config)


class Post:
    """Sends messages to any inbox of the deployment; may be used by several threads."""

    def __init__(self, keys: CurveKeys) -> None:
        self._keys = keys
        self._lock = threading.Lock()
        self._outboxes: dict[str, Outbox] = {}

    def send(self, address: str, message: Message) -> None:
        """Queue a message without waiting.

        A message that cannot be queued is lost: whoever waits for its answer gives up in time. So
        is a message to a malformed address, which another replica may have sent us.
        """
        with self._lock:
            try:
                self._outbox(address).send(to_frame(message))
            except (Unavailable, InvalidRequest) as error:
                logger.warning("%.100r takes no messages: %s", address, error)

    def _outbox(self, address: str) -> Outbox:
        outbox = self._outboxes.get(address)
        if outbox is None:
            outbox = self._outboxes[address] = Outbox(
                address=address, keys=self._keys, queued_frames=_QUEUED_FRAMES, timeout_s=0.0
            )
        return outbox

    def close(self) -> None:
        with self._lock:
            for outbox in self._outboxes.values():
                outbox.close()
            self._outboxes.clear()

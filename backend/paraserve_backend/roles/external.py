"""Role `generate` with an external engine: one full instance of the model.

Requests move to and from other replicas by re-prefill of prompt and tokens; KV blocks do not move.
"""

from __future__ import annotations

import locale
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.architectures.tensors import kv_bytes_per_token
from paraserve_backend.engines.base import AnswerProbe, EngineSettings, Gauges, Reply
from paraserve_backend.engines.entry_points import make_engine
from paraserve_backend.engines.host import EngineHost, Job, engine_request
from paraserve_backend.engines.model_folder import link_model
from paraserve_backend.engines.process_guard import ProcessGuard
from paraserve_backend.engines.pulse import Pulse
from paraserve_backend.generation.encoder import RequestEncoder
from paraserve_backend.generation.text import read_tokenizer
from paraserve_backend.protocol.engine_abilities import can_be_carried, check
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.parameters import GenerateConfig
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.roles.weights import Fetched, open_weights, read_spec
from paraserve_backend.telemetry.spans import SpanName

#: A fetch has its own, shorter limits; this one only ends a wait for a writer that vanished.
_TIMEOUT_S = 3600.0


class ExternalRole:
    def __init__(
        self,
        engine: str,
        config: GenerateConfig,
        gauges: Gauges,
        pulse_file: Path | None = None,
    ) -> None:
        """Wait for the weights and start the engine that a package offers under this name.

        Args:
            engine: its name.
            config: of the model.
            gauges: receives the engine's state.
            pulse_file: what the loop touches while it turns; `None`: there is no agent to look.

        Raises:
            InvalidRequest: there is no such engine, or it does not work here.
            ParaServeError: the weights did not arrive, or the engine did not start.
        """
        made = make_engine(engine)
        self._abilities = made.abilities
        os.environ.update(made.abilities.environment)
        os.environ.update(visible_devices(config.device, os.environ))
        # Triton's stub leaves the locale at ASCII, and engines read files of theirs in UTF-8.
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        with ExitStack() as stack:
            fetched = open_weights(config.weights, whole_objects=True)
            stack.callback(fetched.close)
            spec = read_spec(fetched)
            settings = _settings(config, spec, fetched)
            self._encoder = RequestEncoder(
                tokenizer=read_tokenizer(
                    fetched.file("tokenizer.json"), fetched.json("tokenizer_config.json")
                ),
                vocab_size=spec.vocab_size,
                end_ids=frozenset(i for i in spec.eos_token_ids if i < spec.vocab_size),
                max_context=settings.max_context,
            )
            if made.abilities.has_processes:
                stack.callback(ProcessGuard().close)
            with fetched.spans.span(SpanName.START_ENGINE, engine):
                kv_blocks = settings.kv_tokens // config.kv.block_size
                self._host = EngineHost(made, settings, gauges, kv_blocks, Pulse(pulse_file))
            self._close = stack.pop_all().close

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self._encoder.max_context

    def add(self, request: GenerateRequest, reply: Reply, resume: Resume | None = None) -> None:
        """Take a request in; its answer goes to `reply` from the engine's thread.

        Args:
            request: what the client asked for.
            reply: where the answer goes.
            resume: how far other replicas have come with it; the answer goes on from there. With
                one the request may be handed over, unless it asks for what no engine could carry
                on; without it stays.

        Raises:
            InvalidRequest: the prompt is empty, too long, a token is unknown, or the engine cannot
                do what a setting asks for.
        """
        tokens = list(resume.tokens) if resume else []
        check(request, self._abilities, is_resumed=bool(tokens))
        if resume is None:
            sequence = self._encoder.sequence(request)
        else:
            sequence = self._encoder.resumed(request, resume)
        answer = self._encoder.answer(request, sequence.prompt_ids)
        answer.replay(tokens)
        self._host.add(
            Job(
                request=engine_request(request, sequence),
                sequence=sequence,
                answer=answer,
                reply=reply,
                tokens=tokens,
                is_resumable=resume is not None and can_be_carried(request, self._abilities),
            )
        )

    def probe(self, answer: AnswerProbe) -> None:
        """Have the engine's loop itself say whether it turns."""
        self._host.probe(answer)

    def hand_over(self, targets: tuple[Target, ...]) -> None:
        """Hand all resumable requests over to these replicas, those to come too."""
        self._host.set_targets(targets)

    def close(self) -> None:
        self._host.close()
        self._close()


def visible_devices(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let an engine see one GPU alone; none for the CPU."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {}
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[int(index or 0)] if visible else index or "0"
    return {"CUDA_VISIBLE_DEVICES": chosen}


def _settings(config: GenerateConfig, spec: ModelSpec, fetched: Fetched) -> EngineSettings:
    max_context = min(config.max_context or spec.context_length, spec.context_length)
    kv_tokens = config.max_sequences * max_context
    if config.kv.num_blocks is not None:
        kv_tokens = config.kv.num_blocks * config.kv.block_size
    with fetched.spans.span(SpanName.WAIT_FOR_WEIGHTS):
        model_dir = link_model(fetched.reader, timeout_s=_TIMEOUT_S)
    whole = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    return EngineSettings(
        model_dir=model_dir,
        dtype=spec.dtype,
        device=config.device,
        max_context=min(max_context, kv_tokens),
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=kv_bytes_per_token(spec, whole),
    )

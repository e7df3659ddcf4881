"""Requests of a simulation: drawn from a law or read from traces, the same for the same seed."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import log, sqrt
from pathlib import Path

from paraserve_backend.errors import InvalidRequest

#: Gaps that are drawn before the first that counts, as a multiple of their squared variation.
_LEAD_IN = 5


@dataclass(slots=True, eq=False, kw_only=True)
class SimRequest:
    """One request and what became of it; times in seconds since the trace's start."""

    deployment: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None = None
    end_s: float | None = None
    #: When a replica took it in.
    admitted_s: float | None = None
    was_cold: bool = False
    was_refused: bool = False

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for one token or an unfinished request."""
        if self.first_token_s is None or self.end_s is None or self.output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompts or outputs: log-normal, cut off."""

    mean: float
    #: Standard deviation over mean.
    cv: float
    most: int

    def draw(self, generator: random.Random) -> int:
        if self.cv == 0:
            return min(self.most, max(1, round(self.mean)))
        sigma = sqrt(log(1 + self.cv**2))
        value = generator.lognormvariate(log(self.mean) - sigma**2 / 2, sigma)
        return min(self.most, max(1, round(value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    prompt: Lengths
    output: Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Zipf popularity; within windows of changing rate, gamma gaps of a coefficient of variation.

    More is generated and then thinned at random, as in the paper, whose trace had many more
    requests; thinning makes arrivals less bursty than `cv` says.
    """

    rate_per_s: float
    duration_s: float
    cv: float
    zipf: float
    #: Part of the generated requests that is kept.
    kept: float = 1.0
    #: Rates hold for so long, then change; their own coefficient of variation.
    window_s: float = 60.0
    window_cv: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Deployments among which a Zipf law says who is asked how often."""

    names: tuple[str, ...]
    #: Part of all requests.
    share: float
    #: So many of them, chosen at random, are asked at all.
    active: int


def arrivals(law: Law, crowds: Sequence[Crowd], seed: int) -> list[tuple[float, str]]:
    """Return (time, deployment), in the order of time; as many as rate and duration say."""
    generator = random.Random(f"{seed}/arrivals")
    drawn = [
        (time_s, name)
        for name, rate in _rates(law, crowds, generator)
        for time_s in _renewals(law, rate, f"{seed}/{name}")
    ]
    wanted = round(law.rate_per_s * law.duration_s)
    if len(drawn) > wanted:
        drawn = generator.sample(drawn, wanted)
    return sorted(drawn)


def _rates(
    law: Law, crowds: Sequence[Crowd], generator: random.Random
) -> Iterator[tuple[str, float]]:
    """Requests per second of each deployment that is asked; a little more than wanted in all."""
    for crowd in crowds:
        names = generator.sample(crowd.names, min(crowd.active, len(crowd.names)))
        weights = [1 / rank**law.zipf for rank in range(1, len(names) + 1)]
        for name, weight in zip(names, weights, strict=True):
            yield name, 1.1 * law.rate_per_s * crowd.share * weight / sum(weights)


def _renewals(law: Law, rate: float, seed: str) -> Iterator[float]:
    """Gamma gaps in operational time: the rate of each window stretches or shrinks it."""
    generator = random.Random(seed)
    rate /= law.kept
    shape = 1 / law.cv**2
    factors = _window_factors(law, generator)
    # Begun long before, or every deployment would have the start of a burst at zero.
    position = -_LEAD_IN * law.cv**2 * (1 + generator.random())
    begun = 0.0
    for index, factor in enumerate(factors):
        length = rate * factor * law.window_s
        while position < begun + length:
            if position >= begun and generator.random() < law.kept:
                yield (index + (position - begun) / length) * law.window_s
            position += generator.gammavariate(shape, law.cv**2)
        begun += length


def _window_factors(law: Law, generator: random.Random) -> list[float]:
    count = max(1, round(law.duration_s / law.window_s))
    if law.window_cv == 0:
        return [1.0] * count
    shape = 1 / law.window_cv**2
    return [generator.gammavariate(shape, 1 / shape) for _ in range(count)]


def with_tokens(
    arrived: Iterable[tuple[float, str]], tokens: dict[str, Tokens], seed: int
) -> list[SimRequest]:
    """Give every arrival a prompt and an output length, by its deployment."""
    generator = random.Random(f"{seed}/tokens")
    return [
        SimRequest(
            deployment=name,
            arrival_s=time_s,
            prompt_tokens=tokens[name].prompt.draw(generator),
            output_tokens=tokens[name].output.draw(generator),
        )
        for time_s, name in arrived
    ]


# ---- traces ----


def read_llm_trace(
    path: Path, deployments: Sequence[str], *, zipf: float, seed: int
) -> list[SimRequest]:
    """Read the Azure LLM inference trace of 2023: TIMESTAMP, ContextTokens, GeneratedTokens.

    A column `Deployment`, if there is one, says who is asked; otherwise a Zipf law over
    `deployments` does. Raises `InvalidRequest` with the line that cannot be read.
    """
    generator = random.Random(f"{seed}/popularity")
    weights = [1 / rank**zipf for rank in range(1, len(deployments) + 1)]
    requests: list[SimRequest] = []
    begin: datetime | None = None
    for number, row in _rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            at = _timestamp(row["TIMESTAMP"])
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except ValueError as error:
            raise InvalidRequest(f"{path}, line {number}: {error}.") from None
        begin = begin or at
        name = row.get("Deployment") or generator.choices(deployments, weights)[0]
        requests.append(
            SimRequest(
                deployment=_known(name, deployments, path, number),
                arrival_s=(at - begin).total_seconds(),
                prompt_tokens=max(1, prompt),
                output_tokens=max(1, output),
            )
        )
    requests.sort(key=lambda request: request.arrival_s)
    return requests


def read_functions_trace(
    path: Path, deployments: Sequence[str], *, compression: float = 1.0
) -> list[tuple[float, str]]:
    """Read the Azure Functions trace of 2021: app, func, end_timestamp, duration, in seconds.

    Functions become deployments round robin in the order in which they first appear, as the
    paper does. `compression` divides all times.
    """
    names: dict[tuple[str, str], str] = {}
    arrived: list[tuple[float, str]] = []
    for number, row in _rows(path, ("app", "func", "end_timestamp", "duration")):
        try:
            at_s = float(row["end_timestamp"]) - float(row["duration"])
        except ValueError as error:
            raise InvalidRequest(f"{path}, line {number}: {error}.") from None
        function = (row["app"], row["func"])
        if function not in names:
            names[function] = deployments[len(names) % len(deployments)]
        arrived.append((at_s / compression, names[function]))
    if not arrived:
        return []
    begin_s = min(at_s for at_s, _ in arrived)
    return sorted((at_s - begin_s, name) for at_s, name in arrived)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InvalidRequest(f"{path} lacks the column {missing[0]}.")
            yield from enumerate(reader, start=2)
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.") from None


def columns_of(path: Path) -> tuple[str, ...]:
    """The columns of a trace, which tell its format."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return tuple(csv.DictReader(lines).fieldnames or ())
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.") from None


def _timestamp(text: str) -> datetime:
    # The trace has seven digits of a second, one more than Python reads.
    whole, _, part = text.partition(".")
    return datetime.fromisoformat(f"{whole}.{part[:6].ljust(6, '0')}")


def _known(name: str, deployments: Sequence[str], path: Path, number: int) -> str:
    if name not in deployments:
        raise InvalidRequest(f"{path}, line {number}: the cluster has no deployment '{name}'.")
    return name

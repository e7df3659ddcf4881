"""What past reports of gateways say about a deployment's future: arrivals and durations. Pure."""

from __future__ import annotations

from dataclasses import dataclass

#: Arrivals that are remembered.
_KEPT = 32
#: Completed requests after which older ones count half.
_HALF_LIFE = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandHistory:
    #: Times of the last arrivals, oldest first; as exact as the reports are frequent.
    arrivals_s: tuple[float, ...] = ()
    #: Seconds that requests have been running, summed over requests, and how many have ended.
    busy_s: float = 0.0
    completed: float = 0.0

    @property
    def service_s(self) -> float | None:
        """Mean time a request runs, by Little's law; None before the first has ended."""
        return self.busy_s / self.completed if self.completed >= 1 else None

    def after(
        self, *, arrived: int, completed: int, running: int, elapsed_s: float, at_s: float
    ) -> DemandHistory:
        """The history with one more report of a gateway.

        Args:
            arrived: requests that came since its last one.
            completed: requests that ended since.
            running: requests that ran meanwhile.
            elapsed_s: since its last one.
            at_s: of this one.
        """
        keep = 0.5 if self.completed + completed > _HALF_LIFE else 1.0
        return DemandHistory(
            arrivals_s=(*self.arrivals_s, *(at_s,) * min(arrived, _KEPT))[-_KEPT:],
            busy_s=keep * (self.busy_s + running * elapsed_s),
            completed=keep * (self.completed + completed),
        )

"""One decision while it is made: the cluster, the time, the settings, and what was decided so far.

Every rule of the reconciler gets a turn. Only `do` changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.state.actions import Action
from paraserve_scheduler.state.begin import Begun, begin
from paraserve_scheduler.state.records import Replica
from paraserve_scheduler.state.view import ClusterView


@dataclass(slots=True, kw_only=True)
class Turn:
    #: The cluster as it will be when every action of this turn has begun.
    view: ClusterView
    #: When the turn began; time stands still in it.
    now_s: float
    config: PolicyConfig
    #: Each is possible once those before it have begun.
    actions: list[Action] = field(default_factory=list)

    def do(self, action: Action) -> None:
        """Decide on `action`; what is decided after it sees it as begun."""
        self.actions.append(action)
        self.view = begin(self.view, Begun(action=action, at_s=self.now_s))

    def without_silent_gateways(self) -> Turn:
        """Return this turn without what gateways said that have been silent for too long."""
        since_s = self.now_s - self.config.gateway_timeout_s
        return self.supposing(self.view.without_silent_gateways(since_s))

    def is_released(self, replica: Replica, unrouted_s: float) -> bool:
        """Whether no request runs on a replica that gets no new ones since `unrouted_s`."""
        settled_s = unrouted_s + self.config.settle_s
        return self.now_s >= settled_s and self.view.is_released(replica, settled_s)

    def supposing(self, view: ClusterView) -> Turn:
        """Return a turn in another cluster, to try what could be done there; this one stays."""
        return replace(self, view=view, actions=[])

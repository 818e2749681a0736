"""A worker as the driver sees it: how it is started, asked and ended, and what became of it where it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..store.folder import KEY_VARIABLE
from ..training.stage_orders import StageOrder
from .worker import Identity, Worker

LOST_SECONDS = 10.0
"""How long it may take until it is known that a process died, once another one failed that waited for it."""


@dataclass(eq=False)
class Hand:
    """A worker as the driver sees it: a process, or several that train a stage together."""

    actors: list[Any]
    group: Any = None  # the place that was reserved for several
    work: list[Any] = field(default_factory=list)  # what they do now: references to their results
    pending: list[Any] = field(default_factory=list)  # those of them that did not end yet
    identity: Identity | None = None  # `None` until it has begun
    order: StageOrder | None = None
    serial: int = 0
    called_off: bool = False
    asked: Any = None  # for how much of its stage is done
    share: float = 0.0

    def is_training(self) -> bool:
        """Whether it has a stage."""
        return self.order is not None

    @classmethod
    def start(cls, resources: Mapping[str, float], processes: int) -> Hand:
        """Starts one, as soon as Ray has what each of its processes asks for."""
        others = dict(resources)
        cpus, gpus = others.pop("CPU", 1), others.pop("GPU", 0)
        options = {
            "num_cpus": cpus, "num_gpus": gpus, "resources": others, "max_restarts": 0,
            "runtime_env": {"env_vars": {KEY_VARIABLE: ""}},
        }  # fmt: skip
        group = None
        if processes > 1:
            asked = {"CPU": cpus, "GPU": gpus, **others}
            bundle = {name: amount for name, amount in asked.items() if amount}
            group = placement_group([bundle] * processes, strategy="STRICT_PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        actor = ray.remote(concurrency_groups={"training": 1, "listening": 1})(Worker).options(**options)
        threads = max(int(cpus), 1)
        actors = [actor.remote(threads, 0, processes)]
        actors += [actor.remote(threads, rank, processes, actors[0]) for rank in range(1, processes)]
        return cls(actors, group)

    def do(self, method: str, *args: Any) -> None:
        """Begins some work on every process."""
        self.work = self.ask(method, *args)
        self.pending = [*self.work]

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every process; references to what it gives."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def kill(self) -> None:
        """Ends its processes."""
        for actor in self.actors:
            ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)

    def show_share(self) -> None:
        """Asks how much of its stage is done, without waiting for the answer."""
        if self.asked is None:
            self.asked = self.actors[0].share_done.remote(self.serial)
        elif ray.wait([self.asked], timeout=0)[0]:
            try:
                self.share = ray.get(self.asked)
            except RayError:  # it was lost, which its stage will tell
                pass
            self.asked = None

    def lost(self) -> RayError | None:
        """Why one of its processes is gone, if one is: whoever waited for it has failed, too."""
        if len(self.pending) > 1:
            ray.wait(self.pending, num_returns=len(self.pending), timeout=LOST_SECONDS)
        for work in self.pending:
            try:
                ray.get(work, timeout=0)
            except (RayTaskError, GetTimeoutError):
                continue
            except RayError as error:
                return error
        return None

    def told(self, error: Any) -> Exception:
        """What user code raised on it, with where that was."""
        cause = getattr(error, "cause", None)
        raised: Exception = cause if isinstance(cause, Exception) else error
        where = f"In stage {self.order.stage.name}" if self.order else "While a worker built the trainer"
        raised.add_note(f"{where}, {self.identity or 'on a worker'}:\n{getattr(error, 'traceback_str', '')}")
        return raised

"""
The engine's own job: it prunes what is past its retention, every night.

A job like any other: a cron with a Schedule row, a gate, steps, a run for people to see. Only the
listings leave it out (``registry.jobs``, ``declared``, the Job table), because they are of the host's
jobs, and the clock of a host's tests does not fire it: a test that goes on by two months would be told
of sixty runs it never asked for, and find its history gone. ``AppConfig.ready`` imports this module,
so that it is there whatever ``AUTODISCOVER`` says.
"""

from datetime import timedelta
from itertools import islice
from typing import Any

from . import registry
from .conf import conf
from .retention import START, Place, prune_in_batches
from .triggers import cron

ID = f"{registry.OWN}housekeeping"

#: Batches of one step: a second or two, so that a cluster that is told to stop need not wait for it.
BATCHES = 50

#: Steps of one run, which is ten million rows. What is left then is for the next night.
MOST_STEPS = 2000


def HOUSEKEEPING() -> bool:
    """Say whether the host wants it; a gate that is closed is called by its name."""
    return conf.HOUSEKEEPING


def keep_house(ctx: Any) -> dict[str, Any]:
    """Delete finished runs and old events that are past their retention."""
    done: dict[str, Any] = {"runs": 0, "events": 0, "complete": False}
    place: Place | None = START
    for _ in range(min(MOST_STEPS, conf.MAX_STEPS)):
        pruned = ctx.step.run("prune", prune_some, place)
        done["runs"] += pruned["runs"]
        done["events"] += pruned["events"]
        place = pruned["place"]
        if place is None:
            return done | {"complete": True}
    return done


def prune_some(place: Place) -> dict[str, Any]:
    """Prune from ``place`` for the length of a step; where to go on is None at the end."""
    batches = list(islice(prune_in_batches(place=place), BATCHES))
    return {
        "runs": sum(batch.runs for batch in batches),
        "events": sum(batch.events for batch in batches),
        "place": batches[-1].place if len(batches) == BATCHES else None,
    }


job = registry.register(
    registry.Job(
        id=ID,
        handler=keep_house,
        triggers=(cron("41 3 * * *", jitter=timedelta(minutes=15)),),
        group="engine",
        gate=HOUSEKEEPING,
        retention=timedelta(days=30),
    )
)

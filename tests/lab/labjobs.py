"""Jobs that leave a trace, for tests with real processes."""

import asyncio
import os
import signal
import time
from datetime import timedelta

from django_jobs import Concurrency, Debounce, Singleton, cron, job, on

from .models import Effect


def effect(ctx, name):
    Effect.objects.create(run=ctx.run_id, name=name, pid=os.getpid(), at=time.time())
    return name


@job("lab-nothing")
def nothing(ctx):
    return ctx.event.data


@job("lab-five")
def five(ctx):
    """Three plain steps and two atomic ones, each with its effect in the ledger."""
    pause = ctx.event.data.get("pause", 0)
    for n in range(5):
        tool = ctx.step.atomic if n % 2 else ctx.step.run
        tool(f"step-{n}", effect, ctx, f"step-{n}")
        time.sleep(pause)
    return 5


@job("lab-chain")
def chain(ctx):
    """Steps that do nothing, for measuring what a step costs."""
    for n in range(ctx.event.data["steps"]):
        ctx.step.run(f"s{n}", int)


@job("lab-outside")
def outside(ctx):
    """One step that waits for the outside world, which shows who has it and when it is done."""

    def wait():
        effect(ctx, "begun")
        time.sleep(ctx.event.data["seconds"])
        return effect(ctx, "done")

    ctx.step.run("wait", wait)
    return ctx.step.run("after", effect, ctx, "after")


@job("lab-side-by-side")
def side_by_side(ctx):
    """So many branches that each wait for the outside world, all at once."""
    data = ctx.event.data
    branches = [lambda: ctx.step.run("wait", time.sleep, data["seconds"])] * data["branches"]
    return len(ctx.step.parallel(*branches, limit=data["branches"]))


@job("lab-branches")
def branches(ctx):
    """A branch for each number of seconds; it shows when it began, and waits so long."""

    def wait(n, seconds):
        effect(ctx, f"begun-{n}")
        time.sleep(seconds)

    waits = enumerate(ctx.event.data["seconds"])
    return len(ctx.step.parallel(*[lambda n=n, s=s: ctx.step.run(f"wait-{n}", wait, n, s) for n, s in waits]))


@job("lab-awaits")
async def awaits(ctx):
    """The same in async code, where one thread has all of them."""
    waits = [
        ctx.step.run("wait", asyncio.sleep, ctx.event.data["seconds"])
        for _ in range(ctx.event.data["branches"])
    ]
    return len(await asyncio.gather(*waits))


@job("lab-pick-up")
def pick_up(ctx):
    at = time.time()
    ctx.step.run(
        "note", lambda: Effect.objects.create(run=ctx.run_id, name="picked-up", pid=os.getpid(), at=at).pk
    )


@job("lab-nap")
def nap(ctx):
    ctx.step.sleep("nap", timedelta(seconds=ctx.event.data["seconds"]))
    return ctx.step.run("woke", effect, ctx, "woke")


if os.environ.get("LAB_CRON"):

    @job("lab-cron", cron("* * * * *"))
    def minutely(ctx):
        return ctx.step.run("tick", effect, ctx, "tick")


@job("lab-killer")
def killer(ctx):
    """A step that takes its worker down each time, after a moment."""

    def kill():
        effect(ctx, "begun")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    ctx.step.run("kill", kill)


@job("lab-strict", retries=0)
def strict(ctx):
    """The first thing it does is a query of its own, and it has no second try."""
    effect(ctx, "asked")


def broken_service():
    raise RuntimeError("the flag service is down")


if os.environ.get("LAB_BROKEN_GATE"):

    @job("lab-gated", cron("0 0 1 1 *"), gate=broken_service)
    def gated(ctx):
        return effect(ctx, "gated")


@job("lab-deaf")
def deaf(ctx):
    """A step that does not ask the database again, so that it cannot notice when that goes away."""

    def work():
        effect(ctx, "begun")
        time.sleep(ctx.event.data["seconds"])

    ctx.step.run("work", work)


@job("lab-hangs")
def hangs(ctx):
    """A step that hangs in its first try, and may take a second."""

    def work():
        effect(ctx, "begun")
        if Effect.objects.filter(run=ctx.run_id, name="begun").count() == 1:
            time.sleep(60)
        return effect(ctx, "done")

    strict = ctx.step.using(timeout=timedelta(seconds=1), backoff=[timedelta(0)])
    return strict.run("work", work)


def inside(ctx):
    """Leave when it began and when it ended; of one that was killed only the beginning is left."""
    effect(ctx, "in")
    time.sleep(0.03)
    return effect(ctx, "out")


@job("lab-limited", concurrency=Concurrency(3))
def limited(ctx):
    ctx.step.run("inside", inside, ctx)


@job("lab-limited-step", concurrency=Concurrency(3, scope="step"))
def limited_step(ctx):
    ctx.step.run("inside", inside, ctx)
    ctx.step.sleep("nap", timedelta(seconds=0.2))
    ctx.step.run("again", inside, ctx)


@job("lab-settles", on("lab/changed"), debounce=Debounce(timedelta(seconds=3)))
def settles(ctx):
    ctx.step.run("settle", effect, ctx, "settled")


@job("lab-single", on("lab/changed"), singleton=Singleton(mode="cancel"))
def single(ctx):
    ctx.step.sleep("nap", timedelta(seconds=4))
    ctx.step.run("last", effect, ctx, "last")


@job("lab-asks", on("lab/asked"))
def asks(ctx):
    """Do something for a while, and then wait for the one answer that is meant for it."""
    ctx.step.sleep("a-moment", timedelta(seconds=ctx.event.data["pause"]))
    answer = ctx.step.wait_for_event("answer", "lab/answered", match="n", timeout=timedelta(minutes=10))
    ctx.step.atomic("note", effect, ctx, "answered")
    return {"n": answer.data["n"], "event": answer.pk}

"""The measured jobs. Each notes what it does in the ledger, so that doing it twice would show."""

import os
import time

from django_jobs import cron, job, on

from .ledger import note


@job("bench-chain", on("bench/chain"))
def chain(ctx):
    """As many steps as the event says, none of which does anything."""
    note(ctx.run_id, "begun")
    for n in range(ctx.event.data["steps"]):
        ctx.step.run(f"s{n}", note, ctx.run_id, f"s{n}")


@job("bench-outside", on("bench/outside"), retries=0)
def outside(ctx):
    """A step that waits for the outside world, so that its worker can be killed in the middle."""

    def wait():
        note(ctx.run_id, "waiting")
        time.sleep(ctx.event.data["seconds"])

    ctx.step.run("wait", wait)
    ctx.step.run("after", note, ctx.run_id, "after")


if os.environ.get("BENCH_CRON"):

    @job("bench-cron", cron("* * * * *"))
    def minutely(ctx):
        note(ctx.run_id, "begun")

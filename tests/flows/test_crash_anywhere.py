from collections import Counter
from datetime import timedelta

from django_jobs import Backoff, StepError, job, on
from django_jobs.models import Event, RunStatus, Step


def test_a_worker_may_die_at_every_boundary_and_the_run_ends_as_if_none_had(jobs, ledger, rows):
    job("listens", on("order/told"))(lambda ctx: None)
    failures = Counter()

    def flaky(run_id):
        failures[run_id] += 1
        if failures[run_id] == 1:
            raise ConnectionError("once")
        return "in the end"

    @job("everything", retries=1, backoff=Backoff(first=timedelta(seconds=5), jitter=0))
    def everything(ctx):
        order = ctx.event.data["order"]
        seen = [ctx.step.run("plain", ledger.note, f"plain {order}", {"a": (1, 2)})]
        seen.append(ctx.step.atomic("atomic", rows.add, f"atomic {order}"))
        ctx.step.sleep("nap", timedelta(days=14))
        ctx.step.emit("tell", "order/told", {"order": order})
        seen.append(ctx.step.run("flaky", flaky, ctx.run_id))
        try:
            ctx.step.using(retries=0).run("hopeless", int, "x")
        except StepError as error:
            seen.append(error.type)
        ctx.step.sleep_until("until", ctx.now + timedelta(days=15))
        seen.append(ctx.step.atomic("last", rows.add, f"last {order}"))
        return seen

    order = 0

    def next_order():
        nonlocal order
        order += 1
        return {"order": order}

    boundaries = 0
    for run in jobs.crash_everywhere(everything, next_order):
        boundaries += 1
        assert run.status == RunStatus.COMPLETED, run.error
        assert run.output == [
            {"a": (1, 2)},
            f"atomic {order}",
            "in the end",
            "ValueError",
            f"last {order}",
        ]
        # Exactly once, what is in the database; at least once, and at most twice, what is not.
        assert rows.names().count(f"atomic {order}") == 1
        assert rows.names().count(f"last {order}") == 1
        assert Event.objects.filter(name="order/told", data__order=order).count() == 1
        assert ledger.count(f"plain {order}") in (1, 2)
        names = list(Step.objects.filter(run=run).values_list("name", flat=True))
        assert sorted(names) == sorted(
            ["plain", "atomic", "nap", "tell", "flaky", "hopeless", "until", "last"]
        )
    assert boundaries > 20


def test_a_step_never_runs_again_after_its_checkpoint(jobs, ledger):
    @job("three")
    def three(ctx):
        for n in range(3):
            ctx.step.run(f"step-{n}", ledger.note, (ctx.run_id, n))

    doubled = []
    for run in jobs.crash_everywhere(three):
        counts = Counter(ledger)
        doubled.append(sum(counts[run.pk, n] - 1 for n in range(3)))
    # One boundary of each step lies between its work and its checkpoint, and no other repeats a step.
    assert sorted(doubled) == [0] * (len(doubled) - 3) + [1] * 3

import random
from collections import Counter
from datetime import timedelta

from django_jobs import Backoff, StepError, job, on, passes
from django_jobs.models import Event, Run, RunStatus, Step


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


def test_a_failing_run_fails_the_same_wherever_its_worker_dies(jobs, rows):
    @job("fails", retries=1, backoff=[timedelta(seconds=5)])
    def fails(ctx):
        ctx.step.atomic("begin", rows.add, str(ctx.run_id))
        ctx.step.run("fail", int, "x")

    boundaries = 0
    for run in jobs.crash_everywhere(fails):
        boundaries += 1
        assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
        step = run.steps.get(name="fail")
        assert (step.status, step.attempts) == ("failed", 2)
        assert [attempt.number for attempt in run.attempts.all()] == [1, 2]
        assert rows.names().count(str(run.pk)) == 1
    assert boundaries >= 7


def test_the_code_between_steps_may_fail_and_its_worker_die(jobs, ledger):
    tries = Counter()

    @job("body", retries=2, backoff=[timedelta(seconds=5)])
    def body(ctx):
        ctx.step.run("first", ledger.note, "first")
        tries[ctx.run_id] += 1
        if tries[ctx.run_id] == 1:
            raise ConnectionError
        return ctx.step.run("second", lambda: "fine")

    for run in jobs.crash_everywhere(body):
        assert (run.status, run.output) == (RunStatus.COMPLETED, "fine")


def test_many_runs_in_the_hands_of_dying_workers_all_come_to_their_end(jobs, rows):
    """Each worker dies at one boundary or another of whatever it has in hand, and the next takes over."""

    @job("busy")
    def busy(ctx):
        ctx.step.atomic("first", rows.add, f"first {ctx.event.data['n']}")
        ctx.step.sleep("nap", timedelta(minutes=1))
        ctx.step.emit("tell", "busy/done", {"n": ctx.event.data["n"]})
        ctx.step.atomic("last", rows.add, f"last {ctx.event.data['n']}")
        return ctx.event.data["n"]

    for number in range(10):
        busy.start({"n": number})
    chance = random.Random(7)
    deaths = 0
    while Run.objects.filter(finished_at=None).exists():
        deaths += not survives(jobs, chance)
        jobs._now += timedelta(seconds=20)

    assert deaths > 10
    assert sorted(run.output for run in Run.objects.all()) == list(range(10))
    assert sorted(rows.names()) == sorted(f"{when} {n}" for when in ("first", "last") for n in range(10))
    assert sorted(event.data["n"] for event in jobs.emitted("busy/done")) == list(range(10))


def survives(jobs, chance):
    """Work until nothing is due, or until chance has it that the worker dies."""

    def die_sometimes(moment):
        if chance.random() < 0.1:
            raise passes.Died(moment)

    passes.boundary = die_sometimes
    try:
        jobs.drain()
    except passes.Died:
        return False
    finally:
        passes.boundary = lambda moment: None
    return True

"""``timeouts``: a run that is started too late, or takes too long from there, ends CANCELLED with that reason."""

from datetime import timedelta

import pytest

from django_jobs import Timeouts, cron, emit, job, on, passes, services
from django_jobs.exceptions import InvalidJob
from django_jobs.executor import execute
from django_jobs.models import Run, RunStatus
from django_jobs.signals import run_finished
from django_jobs.testing import now

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

TOO_LATE = "It was not started within 1:00:00 (timeouts.start)."
TOO_LONG = "It did not finish within 1:00:00 (timeouts.finish)."

START = Timeouts(start=HOUR)
FINISH = Timeouts(finish=HOUR)


def fresh(run):
    return Run.objects.get(pk=run.pk)


def ended(run):
    run = fresh(run)
    return run.status, run.reason


def left_alone(jobs, by):
    """Let time go by with no worker there."""
    jobs._now += by


# Started too late.


def test_a_run_that_waited_too_long_for_a_worker_is_not_started(jobs, ledger):
    run = job("report", timeouts=START)(lambda ctx: ledger.note("ran")).start()
    left_alone(jobs, HOUR + MINUTE)
    jobs.drain()

    assert ended(run) == (RunStatus.CANCELLED, TOO_LATE)
    assert ledger == []
    assert fresh(run).finished_at == now()


def test_a_run_that_is_started_just_in_time_is(jobs):
    run = job("report", timeouts=START)(lambda ctx: "fine").start()
    left_alone(jobs, HOUR)
    jobs.drain()

    assert ended(run) == (RunStatus.COMPLETED, "")


def test_in_a_backlog_those_that_are_reached_too_late_are_not_started(jobs):
    """Each takes 25 minutes of the only worker."""

    @job("report", timeouts=START)
    def report(ctx):
        ctx.step.run("work", lambda: left_alone(jobs, 25 * MINUTE))

    runs = [report.start() for _ in range(5)]
    jobs.drain()

    assert [fresh(run).status for run in runs] == [RunStatus.COMPLETED] * 3 + [RunStatus.CANCELLED] * 2


def test_what_is_put_off_is_not_late_before_its_time(jobs):
    job("report", on("month/closed"), timeouts=START)(lambda ctx: "fine")
    run = emit("month/closed", at=now() + DAY).runs.get()
    left_alone(jobs, DAY + HOUR - MINUTE)
    jobs.drain()
    late = emit("month/closed", at=now() + DAY).runs.get()
    left_alone(jobs, DAY + HOUR + MINUTE)
    jobs.drain()

    assert ended(run) == (RunStatus.COMPLETED, "")
    assert ended(late) == (RunStatus.CANCELLED, TOO_LATE)


def test_an_event_of_the_past_is_counted_from_when_it_came(jobs):
    job("report", on("month/closed"), timeouts=START)(lambda ctx: "fine")
    run = emit("month/closed", at=now() - DAY).runs.get()
    jobs.drain()

    assert ended(run) == (RunStatus.COMPLETED, "")


def test_a_cron_that_is_spread_is_counted_from_its_own_time(jobs):
    @job("nightly", cron("0 3 * * *", jitter=timedelta(hours=12)), timeouts=Timeouts(start=MINUTE))
    def nightly(ctx):
        return ctx.scheduled_for

    jobs.advance(3 * DAY)

    runs = Run.objects.filter(job_id="nightly", status=RunStatus.COMPLETED)
    assert runs.count() >= 2
    assert not Run.objects.filter(status=RunStatus.CANCELLED).exists()
    assert max(run.started_at - run.scheduled_for for run in runs) > MINUTE


def test_a_run_that_was_started_in_time_may_sleep_as_long_as_it_likes(jobs):
    @job("report", timeouts=START)
    def report(ctx):
        ctx.step.sleep("nap", DAY)
        ctx.step.run("work", int)

    run = jobs.run(report)
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.COMPLETED, "")


@pytest.mark.parametrize(("wait", "status"), [(MINUTE, "completed"), (HOUR + MINUTE, "cancelled")])
def test_a_worker_that_dies_in_the_first_pass_changes_nothing_about_that(wait, status, jobs):
    """Punctual or late is what the first claim was."""
    run = job("report", timeouts=START)(lambda ctx: "fine").start()
    left_alone(jobs, wait)
    [claimed] = Run.objects.claim(1, jobs=["report"])
    left_alone(jobs, HOUR)
    Run.objects.abandon([claimed.hold])
    jobs.drain()

    assert fresh(run).status == status


# Taking too long.


def test_a_sleeper_is_woken_at_the_deadline_and_ended(jobs, ledger):
    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.run("first", ledger.note, "first")
        ctx.step.sleep("nap", DAY)
        ctx.step.run("second", ledger.note, "second")

    run = jobs.run(long)
    assert fresh(run).wake_at == fresh(run).started_at + HOUR
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert fresh(run).finished_at - fresh(run).started_at == HOUR
    assert ledger == ["first"]


def test_a_run_that_is_done_in_time_is_left_alone(jobs):
    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.sleep("nap", HOUR - MINUTE)
        return "fine"

    run = jobs.run(long)
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.COMPLETED, "")


def test_the_time_counts_from_the_first_pass_and_not_from_the_queue(jobs):
    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.sleep("nap", HOUR - MINUTE)

    run = long.start()
    left_alone(jobs, DAY)
    jobs.advance(HOUR)

    assert ended(run) == (RunStatus.COMPLETED, "")


def test_a_step_in_hand_is_finished_and_kept_and_the_next_one_is_not_begun(jobs, ledger):
    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.run("slow", lambda: left_alone(jobs, 2 * HOUR) or "kept")
        ctx.step.run("next", ledger.note, "next")

    run = jobs.run(long)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert list(run.steps.values_list("name", "status")) == [("slow", "completed")]
    assert run.steps.get().output == "kept"
    assert ledger == []


def test_a_run_whose_last_step_was_begun_in_time_completes(jobs):
    @job("long", timeouts=FINISH)
    def long(ctx):
        return ctx.step.run("slow", lambda: left_alone(jobs, 2 * HOUR) or "kept")

    run = jobs.run(long)

    assert ended(run) == (RunStatus.COMPLETED, "")
    assert fresh(run).output == "kept"


def test_what_is_only_replayed_is_not_too_late_but_what_follows_it_is(jobs, ledger):
    @job("long", timeouts=FINISH)
    def long(ctx):
        for number in range(3):
            ctx.step.run(f"step-{number}", ledger.note, number)
        ctx.step.sleep("nap", HOUR - MINUTE)
        left_alone(jobs, 2 * MINUTE)
        ctx.step.run("late", ledger.note, "late")

    run = jobs.run(long)
    jobs.advance(HOUR - MINUTE)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert ledger == [0, 1, 2]


def test_a_wait_for_an_event_ends_with_it(jobs):
    @job("long", timeouts=FINISH)
    def long(ctx):
        return ctx.step.wait_for_event("payment", "order/paid", timeout=DAY)

    run = jobs.run(long)
    jobs.advance(HOUR)
    emit("order/paid")
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert fresh(run).finished_at - fresh(run).started_at == HOUR


def test_the_pauses_between_the_tries_of_a_step_count(jobs, ledger):
    @job("long", timeouts=FINISH, retries=100, backoff=[25 * MINUTE])
    def long(ctx):
        ctx.step.run("try", lambda: ledger.note(now()) or int("x"))

    run = jobs.run(long)
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert len(ledger) == 3
    assert fresh(run).finished_at - fresh(run).started_at == HOUR


def test_the_pauses_between_the_tries_of_the_code_between_steps_count(jobs, ledger):
    @job("long", timeouts=FINISH, retries=100, backoff=[25 * MINUTE])
    def long(ctx):
        ledger.note(now())
        raise ValueError("no")

    run = jobs.run(long)
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert len(ledger) == 3
    assert fresh(run).finished_at - fresh(run).started_at == HOUR


def test_it_ends_all_branches(jobs, ledger):
    @job("long", timeouts=FINISH)
    def long(ctx):
        def branch(nap, name):
            ctx.step.sleep("nap", nap)
            ctx.step.run("work", ledger.note, name)

        ctx.step.parallel(lambda: branch(MINUTE, "quick"), lambda: branch(DAY, "slow"))

    run = jobs.run(long)
    jobs.advance(DAY)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert ledger == ["quick"]
    assert fresh(run).finished_at - fresh(run).started_at == HOUR


def test_a_branch_that_comes_too_late_to_its_step_ends_the_run(jobs, ledger):
    @job("long", timeouts=FINISH)
    def long(ctx):
        def first():
            ctx.step.run("slow", lambda: left_alone(jobs, 2 * HOUR))
            ctx.step.run("next", ledger.note, "next")

        ctx.step.parallel(first, lambda: ctx.step.run("other", ledger.note, "other"))

    run = jobs.run(long)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert ledger == []


def test_a_job_that_awaits_is_ended_in_the_same_way(jobs, ledger):
    @job("long", timeouts=FINISH)
    async def long(ctx):
        await ctx.step.run("slow", lambda: left_alone(jobs, 2 * HOUR))
        await ctx.step.run("next", ledger.note, "next")

    run = jobs.run(long)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    assert ledger == []


def test_the_children_that_it_waits_for_end_with_it(jobs, ledger):
    @job("grandchild")
    def grandchild(ctx):
        ctx.step.sleep("nap", DAY)
        ledger.note("grandchild")

    @job("child")
    def child(ctx):
        ctx.step.invoke("grandchild", grandchild)
        ledger.note("child")

    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.invoke("child", child)

    run = jobs.run(long)
    jobs.advance(2 * DAY)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
    family = Run.objects.exclude(pk=run.pk)
    assert [one.status for one in family] == [RunStatus.CANCELLED] * 2
    assert {one.finished_at - fresh(run).started_at for one in family} == {HOUR}
    assert ledger == []


def test_a_worker_that_lost_the_run_ends_neither_it_nor_its_children(jobs):
    """It finds the deadline passed, but another one has the run."""
    job("child")(lambda ctx: ctx.step.sleep("nap", DAY))

    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.invoke("child", "child")

    run = jobs.run(long)
    left_alone(jobs, 2 * HOUR)
    [first] = Run.objects.claim(1, jobs=["long"])
    Run.objects.abandon([first.hold])
    [second] = Run.objects.claim(1, jobs=["long"])
    execute(first)

    assert fresh(run).lease == second.lease
    assert fresh(run.children.get()).status == RunStatus.SLEEPING

    execute(second)
    assert fresh(run).status == fresh(run.children.get()).status == RunStatus.CANCELLED


def test_a_run_that_a_person_retries_has_the_whole_time_anew(jobs, ledger):
    broken = [True]

    @job("long", timeouts=FINISH, retries=0)
    def long(ctx):
        ctx.step.run("first", ledger.note, "first")
        ctx.step.run("work", lambda: int("x") if broken else 0)
        ctx.step.sleep("nap", DAY)

    run = jobs.run(long)
    assert fresh(run).status == RunStatus.FAILED
    jobs.advance(7 * DAY)
    broken.clear()
    started_at = fresh(run).started_at
    services.retry(run)
    jobs.drain()

    assert fresh(run).status == RunStatus.SLEEPING
    assert fresh(run).wake_at == now() + HOUR
    assert fresh(run).started_at == started_at
    jobs.advance(DAY)
    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)


def test_the_reason_is_the_one_that_it_was_ended_for(jobs):
    """It was started in time, and took longer than it had been allowed to wait."""

    @job("long", timeouts=Timeouts(start=MINUTE, finish=HOUR))
    def long(ctx):
        ctx.step.run("slow", lambda: left_alone(jobs, 2 * HOUR))
        ctx.step.run("next", int)

    assert ended(jobs.run(long)) == (RunStatus.CANCELLED, TOO_LONG)


def test_the_world_is_told_once(jobs, ledger):
    def receiver(sender, run, **news):
        ledger.note((run.status, run.reason))

    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.sleep("nap", DAY)

    run_finished.connect(receiver)
    try:
        jobs.run(long)
        jobs.advance(DAY)
    finally:
        run_finished.disconnect(receiver)

    assert ledger == [("cancelled", TOO_LONG)]


def test_a_worker_may_die_while_it_ends_a_run(jobs):
    job("child")(lambda ctx: ctx.step.sleep("nap", DAY))

    @job("long", timeouts=FINISH)
    def long(ctx):
        ctx.step.run("work", int)
        ctx.step.invoke("child", "child")

    for run in jobs.crash_everywhere(long):
        assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)
        assert [child.status for child in run.children.all()] in ([], [RunStatus.CANCELLED])


def test_a_worker_that_dies_before_the_end_leaves_it_to_the_next(jobs):
    job("long", timeouts=FINISH)(lambda ctx: ctx.step.sleep("nap", DAY))
    run = jobs.run("long")
    left_alone(jobs, HOUR)

    def die(moment):
        passes.boundary = lambda moment: None
        raise passes.Died(moment)

    passes.boundary = die
    with pytest.raises(passes.Died):
        jobs.drain()
    assert fresh(run).status == RunStatus.RUNNING
    jobs.advance(MINUTE)

    assert ended(run) == (RunStatus.CANCELLED, TOO_LONG)


# Wrong values.


@pytest.mark.parametrize("field", ["start", "finish"])
@pytest.mark.parametrize("wrong", [0, 60, "1h", timedelta(0), -HOUR])
def test_a_time_that_is_none_is_refused(field, wrong):
    with pytest.raises(InvalidJob, match=f"Timeouts: {field} is a timedelta above zero or None"):
        Timeouts(**{field: wrong})


@pytest.mark.parametrize("wrong", [HOUR, {"finish": HOUR}, "1h"])
def test_timeouts_that_are_none_are_refused_when_the_job_is_declared(wrong):
    with pytest.raises(InvalidJob, match="timeouts is Timeouts"):
        job("wrong", timeouts=wrong)(lambda ctx: None)

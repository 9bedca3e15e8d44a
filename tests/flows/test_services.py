from datetime import timedelta

import pytest
from django.db import connection

from django_jobs import StepError, emit, job, on, registry, retention, services, signals
from django_jobs.exceptions import InvalidVerb
from django_jobs.models import Attempt, Event, Run, RunStatus, Step
from django_jobs.testing import now

DAY = timedelta(days=1)


def test_a_cancelled_run_takes_no_further_step(jobs, ledger):
    @job("cancelled")
    def cancelled(ctx):
        ctx.step.run("first", ledger.note, 1)
        ctx.step.sleep("nap", DAY)
        ctx.step.run("second", ledger.note, 2)

    run = jobs.run(cancelled)
    run = services.cancel(run, "the customer left")
    jobs.advance(2 * DAY)
    run.refresh_from_db()
    assert (run.status, run.reason, ledger) == (RunStatus.CANCELLED, "the customer left", [1])
    with pytest.raises(InvalidVerb, match="is cancelled; only an open run can be cancelled"):
        services.cancel(run)


def test_what_a_step_returns_after_a_cancel_is_discarded(jobs):
    @job("cancels-itself")
    def cancels_itself(ctx):
        ctx.step.run("cancel", lambda: services.cancel(ctx.run_id) and None)
        ctx.step.run("never", int)

    run = jobs.run(cancels_itself)
    assert (run.status, run.steps.count()) == (RunStatus.CANCELLED, 0)


def test_a_retried_run_goes_on_from_its_checkpoints(jobs, ledger):
    broken = [True]

    def second():
        if broken:
            raise ValueError("broken")
        return 2

    @job("mends", retries=0)
    def mends(ctx):
        return [ctx.step.run("first", ledger.note, 1, 1), ctx.step.run("second", second)]

    run = jobs.run(mends)
    assert run.status == RunStatus.FAILED
    broken.clear()
    services.retry(run)
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, run.output, ledger) == (RunStatus.COMPLETED, [1, 2], [1])
    with pytest.raises(InvalidVerb, match="only a failed run can be retried"):
        services.retry(run)


def test_a_run_that_is_not_there_is_said_so(db):
    with pytest.raises(InvalidVerb, match="There is no run nonsense"):
        services.cancel("nonsense")


def test_pruning_takes_what_is_old_and_over_and_nothing_else(jobs, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 2)

    @job("ends", on("a/b"), retries=0)
    def ends(ctx):
        ctx.step.using(retries=0).run("fail", int, "x")

    @job("sleeps", on("a/c"))
    def sleeps(ctx):
        ctx.step.sleep("long", 365 * DAY)

    for _ in range(5):
        emit("a/b")
    open_event = emit("a/c")
    jobs.advance(DAY)
    young = emit("a/b")
    jobs.drain()

    assert services.prune(before=now() - timedelta(hours=1)) == {"runs": 5, "events": 5}
    assert set(Event.objects.all()) == {open_event, young}
    assert set(Run.objects.values_list("status", flat=True)) == {"sleeping", "failed"}
    assert (Step.objects.count(), Attempt.objects.count()) == (2, 1)
    assert services.prune(before=now() - timedelta(hours=1)) == {"runs": 0, "events": 0}
    jobs.advance(60 * DAY)
    assert services.prune()["runs"] == 1


# Cancel.


@pytest.mark.parametrize("by", ["run", "id", "text"])
def test_a_run_may_be_named_by_itself_or_by_its_id(by, jobs):
    run = job("waits")(lambda ctx: None).start()

    services.cancel({"run": run, "id": run.pk, "text": str(run.pk)}[by])

    run.refresh_from_db()
    assert run.status == RunStatus.CANCELLED


@pytest.mark.parametrize("ending", ["completed", "failed", "skipped", "cancelled"])
def test_what_has_ended_cannot_be_cancelled_and_stays_as_it_is(ending, jobs):
    run = job("ends", retries=0)(lambda ctx: None if ending == "completed" else 1 / 0).start()
    if ending == "skipped":
        Run.objects.filter(pk=run.pk).skip("because")
    if ending == "cancelled":
        Run.objects.filter(pk=run.pk).cancel("because")
    jobs.drain()
    before = Run.objects.values().get()
    assert before["status"] == ending

    with pytest.raises(InvalidVerb, match=f"is {ending}; only an open run can be cancelled"):
        services.cancel(run, "too late")

    assert Run.objects.values().get() == before


def test_a_stale_instance_does_not_matter_the_row_decides(jobs):
    job("ends")(lambda ctx: None).start()
    stale = Run.objects.get()
    jobs.drain()

    assert stale.status == RunStatus.QUEUED
    with pytest.raises(InvalidVerb, match="is completed"):
        services.cancel(stale)


def test_a_reason_is_kept_as_far_as_it_fits(jobs):
    run = job("waits")(lambda ctx: None).start()

    assert services.cancel(run, "because " * 200).reason.startswith("because because")


def test_cancelling_is_news(jobs, django_capture_on_commit_callbacks):
    run = job("waits")(lambda ctx: None).start()
    heard = []

    def hear(sender, run, **news):
        heard.append((run.pk, run.status, run.reason))

    signals.run_finished.connect(hear)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            services.cancel(run, "not wanted")
    finally:
        signals.run_finished.disconnect(hear)

    assert heard == [(run.pk, "cancelled", "not wanted")]


@pytest.fixture
def family(jobs):
    """A run, its child and grandchild asleep, and a child that has ended."""
    nap = job("nap")(lambda ctx: ctx.step.sleep("nap", DAY) if ctx.event.data.get("nap", True) else None)
    root, child, grandchild = (jobs.run(nap) for _ in range(3))
    over = jobs.run(nap, {"nap": False})
    Run.objects.filter(pk__in=[child.pk, over.pk]).update(parent=root)
    Run.objects.filter(pk=grandchild.pk).update(parent=child)
    return root, child, grandchild, over


def endings(runs):
    return [tuple(Run.objects.values_list("status", "reason").get(pk=run.pk)) for run in runs]


def test_the_runs_it_invoked_are_cancelled_with_it(family, django_capture_on_commit_callbacks):
    root, child, grandchild, _ = family
    heard = []

    def hear_end(sender, run, **news):
        heard.append((run.pk, run.status))

    def hear_person(sender, actor, verb, ids, reason, **news):
        heard.append((actor, verb, ids, reason))

    signals.run_finished.connect(hear_end)
    signals.admin_action.connect(hear_person)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            services.cancel(root, "not wanted", actor="ada")
    finally:
        signals.run_finished.disconnect(hear_end)
        signals.admin_action.disconnect(hear_person)

    with_it = ("cancelled", f"With its parent {root.pk}: not wanted")
    assert endings(family) == [("cancelled", "not wanted"), with_it, with_it, ("completed", "")]
    ids = [root.pk, child.pk, grandchild.pk]
    assert heard == [*((pk, "cancelled") for pk in ids), ("ada", "cancel", ids, "not wanted")]


def test_the_runs_it_invoked_may_be_left_alone(family):
    services.cancel(family[0], cascade=False)
    assert [status for status, _ in endings(family)] == ["cancelled", "sleeping", "sleeping", "completed"]


def test_a_parent_is_not_cancelled_with_its_child(family):
    services.cancel(family[1])
    assert [status for status, _ in endings(family)] == ["sleeping", "cancelled", "cancelled", "completed"]


def test_a_run_that_has_ended_takes_no_child_along(family):
    Run.objects.filter(pk=family[0].pk).cancel()
    with pytest.raises(InvalidVerb):
        services.cancel(family[0])
    assert endings(family[1:2]) == [("sleeping", "")]


@pytest.mark.django_db(transaction=True)
def test_of_several_at_once_one_cancels_and_the_others_are_told(at_once):
    run = job("waits")(lambda ctx: None).start()

    def cancel():
        try:
            return services.cancel(run).pk
        except InvalidVerb as refusal:
            return str(refusal)

    done = at_once(cancel)
    assert done.count(run.pk) == 1
    assert sum("is cancelled; only an open run" in str(answer) for answer in done) == 3


# Retry.


def test_a_retried_body_begins_with_a_full_set_of_retries(jobs, ledger):
    @job("stubborn", retries=1, backoff=[timedelta(seconds=1)])
    def stubborn(ctx):
        ledger.note(ctx.attempt)
        raise ValueError("no")

    run = jobs.run(stubborn)
    jobs.advance(DAY)
    again = services.retry(run)
    assert (again.status, again.attempt, again.error, again.finished_at) == (RunStatus.QUEUED, 0, None, None)
    jobs.advance(DAY)

    run.refresh_from_db()
    assert run.status == RunStatus.FAILED
    assert ledger == [0, 1, 0, 1]
    assert run.attempts.count() == 4


def test_a_retried_step_begins_with_a_full_set_of_retries_and_keeps_its_old_attempts(jobs, ledger):
    @job("stubborn", retries=1, backoff=[timedelta(seconds=1)])
    def stubborn(ctx):
        ctx.step.run("fail", lambda: ledger.note("tried") or 1 / 0)

    run = jobs.run(stubborn)
    jobs.advance(DAY)
    services.retry(run)
    jobs.advance(DAY)

    run.refresh_from_db()
    assert run.status == RunStatus.FAILED
    assert len(ledger) == 4
    assert run.attempts.count() == 4
    assert run.steps.get().attempts == 2


def test_a_failure_the_job_had_caught_is_not_tried_again(jobs, ledger):
    broken = [True]

    @job("saga", retries=0)
    def saga(ctx):
        try:
            ctx.step.run("caught", lambda: ledger.note("caught") or 1 / 0)
        except StepError:
            ctx.step.run("instead", ledger.note, "instead")
        ctx.step.run("fatal", lambda: 1 / 0 if broken else ledger.note("mended"))

    run = jobs.run(saga)
    broken.clear()
    services.retry(run)
    jobs.drain()

    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED
    assert ledger == ["caught", "instead", "mended"]


@pytest.mark.parametrize("why", ["unknown", "gated off"])
def test_a_run_that_nobody_would_take_is_not_retried(why, jobs, flags, monkeypatch):
    flags({"payment": {"enabled": True}})
    run = jobs.run(job("fails", retries=0, gate="payment.enabled")(lambda ctx: 1 / 0))
    if why == "unknown":
        monkeypatch.delitem(registry._jobs, "fails")
    else:
        flags({"payment": {"enabled": False}})

    with pytest.raises(InvalidVerb, match=rf'Run {run.pk} cannot go on\. (No job|Job) "fails" is'):
        services.retry(run)

    run.refresh_from_db()
    assert run.status == RunStatus.FAILED


def test_a_run_that_crashed_too_often_may_be_retried(jobs):
    run = job("deadly")(lambda ctx: "fine after all").start()
    for _ in range(6):
        [claimed] = Run.objects.claim(1, jobs=["deadly"])
        Run.objects.abandon([claimed.hold])
    jobs.drain()
    services.retry(run)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.output, run.crashes) == (RunStatus.COMPLETED, "fine after all", 0)


# Prune.


def test_without_retention_everything_is_kept(jobs, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": None}
    jobs.run(job("ends")(lambda ctx: None))
    jobs.advance(10_000 * DAY)

    assert services.prune() == {"runs": 0, "events": 0}
    assert Run.objects.exists()


def test_pruning_goes_by_the_setting(jobs, settings):
    settings.DJANGO_JOBS = {"RETENTION_DAYS": 7}
    jobs.run(job("ends")(lambda ctx: None))
    jobs.advance(7 * DAY)
    assert services.prune() == {"runs": 0, "events": 0}

    jobs.advance(timedelta(seconds=1))
    assert services.prune() == {"runs": 1, "events": 1}


def test_an_old_event_of_an_open_run_stays_though_others_of_its_runs_go(jobs):
    job("ends", on("a/b"))(lambda ctx: None)
    job("sleeps", on("a/b"))(lambda ctx: ctx.step.sleep("long", 365 * DAY))
    event = emit("a/b")
    jobs.advance(60 * DAY)

    assert services.prune() == {"runs": 1, "events": 0}
    assert event.runs.get().job_id == "sleeps"


def test_a_key_of_a_pruned_event_may_be_used_again(jobs):
    first = emit("a/b", key="k")
    jobs.advance(60 * DAY)
    services.prune()

    assert emit("a/b", key="k") != first


def test_what_was_made_of_a_pruned_run_stays_without_it(jobs):
    old = jobs.run(job("ends")(lambda ctx: None))
    jobs.advance(60 * DAY)
    young = job("waits")(lambda ctx: None).start()
    Run.objects.filter(pk=young.pk).update(parent=old, replay_of=old)

    assert services.prune()["runs"] == 1
    young.refresh_from_db()
    assert (young.parent, young.replay_of) == (None, None)


def test_a_run_retried_while_old_runs_are_pruned_is_not_pruned(jobs):
    run = jobs.run(job("fails", retries=0)(lambda ctx: 1 / 0))
    jobs.advance(60 * DAY)
    retried = []

    def retry_after_the_first_look(execute, sql, params, many, context):
        result = execute(sql, params, many, context)
        if not retried and sql.startswith("SELECT") and "finished_at" in sql:
            retried.append(Run.objects.filter(pk=run.pk).requeue())
        return result

    with connection.execute_wrapper(retry_after_the_first_look):
        pruned = services.prune()

    assert retried == [1]
    assert pruned == {"runs": 0, "events": 0}
    run.refresh_from_db()
    assert (run.status, run.attempts.count()) == (RunStatus.QUEUED, 1)

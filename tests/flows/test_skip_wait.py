"""``services.skip_wait``: what a run waits for counts as over, and it goes on now."""

from datetime import timedelta

import pytest

from django_jobs import emit, job, on, services, signals
from django_jobs.exceptions import InvalidVerb
from django_jobs.models import Run, RunStatus, Step

DAY = timedelta(days=1)


@pytest.fixture
def naps(ledger):
    @job("naps")
    def naps(ctx):
        ctx.step.sleep("first-nap", 14 * DAY)
        ctx.step.run("between", ledger.note, "between")
        ctx.step.sleep_until("second-nap", ctx.now + 30 * DAY)
        ctx.step.run("after", ledger.note, "after")

    return naps


def test_a_sleeping_run_goes_on_now(naps, jobs, ledger):
    run = jobs.run(naps)

    run = services.skip_wait(run)
    assert run.status == RunStatus.SLEEPING
    jobs.drain()

    assert ledger == ["between"]
    nap = run.steps.get(name="first-nap")
    assert (nap.status, nap.finished_at) == ("completed", jobs._now)


def test_only_the_wait_it_is_in_is_skipped(naps, jobs, ledger):
    run = jobs.run(naps)
    services.skip_wait(run)
    jobs.drain()

    run.refresh_from_db()
    assert run.status == RunStatus.SLEEPING
    services.skip_wait(run)
    jobs.drain()
    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.COMPLETED, ["between", "after"])


def test_a_step_between_two_attempts_is_tried_again_now(jobs, ledger):
    broken = [True]

    @job("stubborn", retries=1, backoff=[DAY])
    def stubborn(ctx):
        ctx.step.run("fail", lambda: 1 / 0 if broken else ledger.note("mended"))

    run = jobs.run(stubborn)
    broken.clear()
    services.skip_wait(run)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, ledger, run.steps.get().attempts) == (RunStatus.COMPLETED, ["mended"], 2)


def test_the_code_between_steps_is_tried_again_now(jobs, ledger):
    @job("stubborn", retries=1, backoff=[DAY])
    def stubborn(ctx):
        ledger.note(ctx.attempt)
        if ctx.attempt == 0:
            raise ValueError("not yet")

    run = jobs.run(stubborn)
    services.skip_wait(run)
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, ledger) == (RunStatus.COMPLETED, [0, 1])


def test_a_run_held_until_its_event_happens_starts_now(jobs):
    job("later", on("a/b"))(lambda ctx: "done")
    run = emit("a/b", at=jobs._now + DAY).runs.get()
    services.skip_wait(run)
    jobs.drain()
    run.refresh_from_db()
    assert run.output == "done"


def test_a_run_that_is_due_is_refused_and_stays_as_it_is(jobs, naps):
    run = naps.start()
    with pytest.raises(InvalidVerb, match="is due already"):
        services.skip_wait(run)
    jobs.drain()
    services.skip_wait(run)
    before = Run.objects.values().get(), Step.objects.values().get()
    with pytest.raises(InvalidVerb, match="is due already"):
        services.skip_wait(run)
    assert (Run.objects.values().get(), Step.objects.values().get()) == before


@pytest.mark.parametrize("status", ["running", "completed", "cancelled"])
def test_a_run_that_is_not_asleep_is_refused(status, jobs, naps):
    run = job("ends")(lambda ctx: None).start()
    if status == "running":
        Run.objects.claim(1, jobs=["ends"])
    elif status == "completed":
        jobs.drain()
    else:
        Run.objects.cancel()
    before = Run.objects.values().get()
    with pytest.raises(InvalidVerb, match=f"is {status}; only one that sleeps"):
        services.skip_wait(run)
    assert Run.objects.values().get() == before


def test_who_skipped_it_is_news(naps, jobs, django_capture_on_commit_callbacks):
    run, heard = jobs.run(naps), []

    def hear(sender, actor, verb, ids, reason, **rest):
        heard.append((actor, verb, ids, reason))

    signals.admin_action.connect(hear)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            services.skip_wait(run, reason="in a hurry", actor="ada")
        with pytest.raises(InvalidVerb), django_capture_on_commit_callbacks(execute=True):
            services.skip_wait(run, actor="bob")
    finally:
        signals.admin_action.disconnect(hear)
    assert heard == [("ada", "skip_wait", [run.pk], "in a hurry")]


@pytest.mark.django_db(transaction=True)
def test_of_several_at_once_one_does_it_and_the_others_are_told(at_once):
    run = job("later", on("a/b"))(lambda ctx: None).start()
    Run.objects.update(wake_at=run.queued_at + DAY)

    def skip():
        try:
            return services.skip_wait(run).pk
        except InvalidVerb as refusal:
            return str(refusal)

    done = at_once(skip)
    assert done.count(run.pk) == 1
    assert sum("is due already" in str(answer) for answer in done) == 3


@pytest.mark.parametrize("kind", ["wait", "invoke"])
def test_a_wait_for_an_event_is_over_but_not_a_wait_for_another_run(kind, jobs, naps):
    run = jobs.run(naps)
    Step.objects.filter(run=run).update(kind=kind)
    if kind == "wait":
        services.skip_wait(run)
        assert run.steps.get().wake_at == jobs._now
        return
    before = Run.objects.values().get(), Step.objects.values().get()
    with pytest.raises(InvalidVerb, match="waits for a run that it invoked"):
        services.skip_wait(run)
    assert (Run.objects.values().get(), Step.objects.values().get()) == before

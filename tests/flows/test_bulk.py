"""``services.bulk``: a verb for all runs that a filter chooses, each once, whatever happens meanwhile."""

from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import OperationalError

from django_jobs import job, operations, registry, services, signals, verbs
from django_jobs.exceptions import InvalidVerb
from django_jobs.executor import execute
from django_jobs.models import Attempt, Operation, Run, claim

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _of_the_engine(_alone, monkeypatch):
    """The engine's own job is there, and its batches are small enough for a test."""
    registry.register(operations.job)
    monkeypatch.setattr(operations, "BATCH", 3)


@pytest.fixture
def naps():
    return job("naps")(lambda ctx: ctx.step.sleep("nap", DAY))


@pytest.fixture
def fails(ledger):
    @job("fails", retries=0)
    def fails(ctx):
        ledger.note(ctx.run_id)
        if ctx.event.data.get("broken", True):
            raise {"value": ValueError, "key": KeyError}[ctx.event.data.get("error", "value")]("no")

    return fails


def started(job, number, **data):
    return [job.start(data) for _ in range(number)]


def statuses(runs):
    return [Run.objects.get(pk=run.pk).status for run in runs]


def result(operation):
    operation.refresh_from_db()
    counts = operation.total, operation.done, operation.skipped, operation.failed
    return operation.status, *counts


# Each verb.


def test_all_that_the_filter_chooses_is_cancelled_and_nothing_else(naps, fails, jobs):
    chosen, other = started(naps, 7), started(fails, 2)
    jobs.drain()

    operation = services.bulk("cancel", {"job": "naps"}, reason="not wanted", actor="ada")
    assert result(operation) == ("working", 7, 0, 0, 0)
    jobs.drain()

    assert result(operation) == ("completed", 7, 7, 0, 0)
    assert (operation.actor, operation.reason, operation.finished_at) == ("ada", "not wanted", jobs._now)
    assert statuses(chosen) == ["cancelled"] * 7
    assert {run.reason for run in Run.objects.filter(job_id="naps")} == {"not wanted"}
    assert statuses(other) == ["failed"] * 2
    assert operation.run.status == "completed"


def test_all_that_failed_is_retried(fails, jobs, ledger):
    runs = started(fails, 4)
    jobs.drain()
    ledger.clear()

    operation = services.bulk("retry", {"status": "failed"})
    jobs.drain()

    assert result(operation) == ("completed", 4, 4, 0, 0)
    assert sorted(ledger) == sorted(run.pk for run in runs)


def test_all_that_failed_is_replayed_once(fails, jobs, ledger):
    runs = started(fails, 4)
    jobs.drain()

    operation = services.bulk("replay", {"job": ["fails"]})
    jobs.drain()

    assert result(operation) == ("completed", 4, 4, 0, 0)
    assert len(ledger) == 8
    assert [run.replays.count() for run in runs] == [1] * 4


def test_all_that_sleeps_is_woken(naps, jobs):
    asleep, due = started(naps, 4), []
    jobs.drain()
    due = started(naps, 1)
    operation = services.bulk("skip_wait", {"job": "naps"})
    jobs.drain()
    assert result(operation) == ("completed", 4, 4, 0, 0)
    assert statuses(asleep) == ["completed"] * 4
    assert statuses(due) == ["sleeping"]


# What is chosen.


def chosen_by(filter):
    return services.matching("replay", filter)


def test_a_filter_chooses_by_all_that_it_says(fails, jobs):
    started(fails, 1, error="value")
    started(fails, 2, error="key")
    started(fails, 4, broken=False)
    jobs.drain()
    long_ago = jobs._now
    jobs.advance(DAY)
    last = started(fails, 8)
    Run.objects.filter(pk__in=[run.pk for run in last]).update(version="2")
    jobs.drain()

    assert chosen_by({"job": "fails"}) == 15
    assert chosen_by({"status": "completed"}) == 4
    assert chosen_by({"status": ["completed", "failed"], "until": jobs._now}) == 7
    assert chosen_by({"error": "KeyError"}) == 2
    assert chosen_by({"error": ["KeyError", "ValueError"], "until": jobs._now}) == 3
    assert chosen_by({"since": (long_ago + DAY).isoformat()}) == 8
    assert chosen_by({"since": long_ago, "until": long_ago + timedelta(seconds=1)}) == 7
    assert chosen_by({"version": "2"}) == 8
    assert chosen_by({"runs": [last[0], last[1].pk, str(last[2].pk), uuid4()]}) == 3
    assert chosen_by({"job": "others"}) == 0


@pytest.mark.parametrize(("verb", "number"), [("cancel", 1), ("retry", 2), ("replay", 6), ("skip_wait", 1)])
def test_only_runs_that_the_verb_can_be_done_to_are_chosen(verb, number, naps, fails, jobs):
    started(naps, 1), started(fails, 2), started(fails, 4, broken=False)
    jobs.drain()
    assert services.matching(verb, {"job": ["naps", "fails"]}) == number


def test_the_engines_own_runs_are_never_chosen(naps, jobs):
    started(naps, 1)
    services.bulk("cancel", {"status": ["queued", "sleeping", "running"]})
    jobs.drain()
    assert Run.objects.get(job_id=operations.ID).status == "completed"


def test_runs_that_come_later_are_not_meant(naps, jobs):
    before = started(naps, 4)
    operation = services.bulk("cancel", {"job": "naps"})
    later = started(naps, 4)
    jobs.drain()
    assert result(operation) == ("completed", 4, 4, 0, 0)
    assert statuses(before) == ["cancelled"] * 4
    assert statuses(later) == ["sleeping"] * 4


@pytest.mark.parametrize(
    ("verb", "filter", "why"),
    [
        ("cancle", {"job": "x"}, 'There is no bulk form of "cancle". Did you mean "cancel"'),
        ("prune", {"job": "x"}, 'There is no bulk form of "prune"'),
        ("cancel", {}, "Which runs"),
        ("cancel", {"jobs": "x"}, 'A filter has no "jobs". Did you mean "job"'),
        ("cancel", {"status": "queud"}, 'There is no status "queud". Did you mean "queued"'),
        ("cancel", {"since": "yesterday"}, "since is a time, not 'yesterday'"),
        ("cancel", {"until": "2030-01-01"}, "until is a time with an offset"),
        ("cancel", {"runs": ["nonsense"]}, "runs is one value or a list"),
        ("cancel", {"job": 7}, "job is one value or a list"),
        ("cancel", {"job": "nobody"}, "No such run"),
    ],
)
def test_what_a_filter_cannot_mean_is_refused(verb, filter, why, db):
    with pytest.raises(InvalidVerb, match=why):
        services.bulk(verb, filter)
    assert not Operation.objects.exists()
    assert not Run.objects.exists()


# What changes meanwhile.


def test_runs_that_changed_meanwhile_are_left_alone_and_counted(naps, jobs):
    runs = started(naps, 5)
    operation = services.bulk("cancel", {"status": "queued"})
    Run.objects.filter(pk=runs[1].pk).cancel()
    Run.objects.filter(pk=runs[3].pk).skip("because")
    jobs.drain()
    assert result(operation) == ("completed", 5, 3, 2, 0)
    assert statuses(runs) == ["cancelled", "cancelled", "cancelled", "skipped", "cancelled"]


def test_one_that_changes_in_the_last_moment_is_refused_with_its_reason(naps, jobs, monkeypatch):
    runs = started(naps, 3)
    cancel = verbs.cancel

    def too_late(run, reason, *, cascade):
        if run.pk == runs[1].pk:
            Run.objects.filter(pk=run.pk).skip("first")
        return cancel(run, reason, cascade=cascade)

    monkeypatch.setattr(verbs, "cancel", too_late)
    operation = services.bulk("cancel", {"job": "naps"})
    jobs.drain()

    assert result(operation) == ("completed", 3, 2, 1, 0)
    [refusal] = operation.refusals
    assert refusal["run"] == str(runs[1].pk)
    assert "only an open run can be cancelled" in refusal["reason"]


def test_one_that_fails_costs_none_of_the_others(naps, fails, jobs, monkeypatch):
    runs = [*started(naps, 2), *started(fails, 2), *started(naps, 2)]
    Run.objects.cancel()
    monkeypatch.delitem(registry._jobs, "fails")

    operation = services.bulk("replay", {"status": "cancelled"})
    jobs.drain()

    assert result(operation) == ("completed", 6, 4, 0, 2)
    assert [refusal["run"] for refusal in operation.refusals] == [str(run.pk) for run in runs[2:4]]
    assert operation.refusals[0]["reason"].startswith('JobNotFound: No job "fails" is declared')


def test_of_many_refusals_the_first_are_kept_and_all_are_counted(fails, jobs, monkeypatch):
    started(fails, 9)
    jobs.drain()
    monkeypatch.setattr(operations, "MOST_REFUSALS", 2)
    monkeypatch.delitem(registry._jobs, "fails")
    operation = services.bulk("retry", {"job": "fails"})
    jobs.drain()
    assert result(operation) == ("completed", 9, 0, 9, 0)
    assert len(operation.refusals) == 2


# Crashes.


def test_each_run_is_replayed_once_wherever_the_worker_dies(jobs):
    @job("plain")
    def plain(ctx):
        return "done"

    survived = 0
    for nth in range(100):
        runs = started(plain, 7)
        jobs.drain()
        operation = services.bulk("replay", {"runs": runs})
        died = jobs._run_until_death(nth)
        jobs._until_quiet()

        assert result(operation) == ("completed", 7, 7, 0, 0)
        assert [run.replays.count() for run in runs] == [1] * 7
        if not died:
            break
        survived += 1
    assert survived > 10


def test_a_batch_that_the_database_refuses_is_done_again(naps, jobs, monkeypatch):
    runs = started(naps, 5)
    cancel, refusals = verbs.cancel, [OperationalError("deadlock")]

    def unlucky(run, reason, *, cascade):
        if run.pk == runs[4].pk and refusals:
            raise refusals.pop()
        return cancel(run, reason, cascade=cascade)

    monkeypatch.setattr(verbs, "cancel", unlucky)
    operation = services.bulk("cancel", {"job": "naps"})
    jobs.drain()
    assert result(operation) == ("working", 5, 3, 0, 0)
    jobs.advance(DAY)

    assert result(operation) == ("completed", 5, 5, 0, 0)
    assert Attempt.objects.get().error["type"] == "OperationalError"


def test_an_operation_longer_than_a_run_goes_on_in_another(naps, jobs, monkeypatch):
    monkeypatch.setattr(operations, "MOST_BATCHES", 2)
    runs = started(naps, 20)
    operation = services.bulk("cancel", {"job": "naps"})
    jobs.drain()
    assert result(operation) == ("completed", 20, 20, 0, 0)
    assert statuses(runs) == ["cancelled"] * 20
    own = Run.objects.filter(job_id=operations.ID)
    assert own.count() == 4
    assert operation.run == own.order_by("pk").last()


def test_an_operation_whose_own_run_was_cancelled_goes_on_where_it_was_when_that_is_replayed(jobs):
    runs = started(job("plain")(lambda ctx: None), 7)
    jobs.drain()
    operation = services.bulk("replay", {"runs": runs})
    claim.forget()  # On MariaDB the priorities in use are looked up once a second.
    [claimed] = Run.objects.claim(1, jobs=[operations.ID])
    execute(claimed, stopping=lambda: claimed.steps.count() == 1)
    services.cancel(operation.run)
    assert result(operation) == ("working", 7, 3, 0, 0)

    services.replay(operation.run)
    jobs.drain()

    assert result(operation) == ("completed", 7, 7, 0, 0)
    assert [run.replays.count() for run in runs] == [1] * 7


# Abort.


def test_an_aborted_operation_goes_no_further(naps, jobs, monkeypatch):
    runs = started(naps, 9)
    done_batches = []
    do_batch = operations.do_batch

    def then_abort(key):
        more = do_batch(key)
        done_batches.append(more)
        if len(done_batches) == 2:
            services.abort(key, reason="a mistake", actor="bob")
        return more

    monkeypatch.setattr(operations, "do_batch", then_abort)
    operation = services.bulk("cancel", {"job": "naps"})
    jobs.drain()

    assert result(operation) == ("aborted", 9, 6, 0, 0)
    assert statuses(runs) == ["cancelled"] * 6 + ["sleeping"] * 3
    assert operation.run.status == "completed"


def test_an_operation_may_be_aborted_before_it_begins(naps, jobs):
    runs = started(naps, 2)
    operation = services.bulk("cancel", {"job": "naps"})
    assert services.abort(operation).status == "aborted"
    jobs.drain()
    assert statuses(runs) == ["sleeping"] * 2


def test_what_is_over_or_not_there_cannot_be_aborted(naps, jobs):
    started(naps, 1)
    operation = services.bulk("cancel", {"job": "naps"})
    jobs.drain()
    with pytest.raises(InvalidVerb, match="is completed; it cannot be aborted"):
        services.abort(operation)
    with pytest.raises(InvalidVerb, match="There is no operation nonsense"):
        services.abort("nonsense")
    assert result(operation)[0] == "completed"


# News.


def test_people_and_ends_are_news(naps, jobs):
    heard = []

    def hear_person(sender, actor, verb, ids, reason, **rest):
        heard.append((actor, verb, ids, reason))

    def hear_end(sender, run, **rest):
        if run.job_id == "naps":
            ended.append(run.pk)

    runs, ended = started(naps, 4), []
    signals.admin_action.connect(hear_person)
    signals.run_finished.connect(hear_end)
    try:
        operation = services.bulk("cancel", {"job": "naps"}, "not wanted", "ada")
        jobs.drain()
    finally:
        signals.admin_action.disconnect(hear_person)
        signals.run_finished.disconnect(hear_end)

    ids = [run.pk for run in runs]
    assert ended == ids
    assert heard == [
        ("ada", "bulk", [operation.pk], "not wanted"),
        ("ada", "cancel", ids[:3], "not wanted"),
        ("ada", "cancel", ids[3:], "not wanted"),
    ]


# The engine's own job.


def test_the_engines_own_job_is_in_no_listing_of_jobs_but_clusters_take_it(naps, jobs):
    from django_jobs.broker import RunBroker

    assert [job.id for job in registry.jobs()] == ["naps"]
    assert [job.id for job in registry.known()] == ["naps"]
    assert [job.job.id for job in registry.declared()] == ["naps"]
    assert operations.ID in RunBroker().served()


def test_an_operation_does_not_wait_behind_the_backlog_it_is_to_clear(naps, jobs):
    started(naps, 3)
    services.bulk("cancel", {"status": "queued"})
    [first] = Run.objects.claim(1, jobs=["naps", operations.ID])
    assert first.job_id == operations.ID

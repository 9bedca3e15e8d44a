import pytest
from django.db import transaction

from django_jobs import JobNotFound, cron, job, trigger
from django_jobs.exceptions import InvalidEvent
from django_jobs.models import Event, Run


def test_a_job_is_started_by_hand_with_its_data(jobs):
    @job("by-hand")
    def by_hand(ctx):
        return ctx.event.data

    run = by_hand.start({"x": 1})
    assert (run.job_id, run.status, run.event.name) == ("by-hand", "queued", "django_jobs/job.started")
    jobs.drain()
    run.refresh_from_db()
    assert run.output == {"x": 1}
    assert jobs.emitted() == []


def test_a_cron_job_is_run_now_by_its_id(jobs):
    job("nightly", cron("0 3 * * *"))(lambda ctx: "ran")
    run = trigger("nightly")
    jobs.drain()
    run.refresh_from_db()
    assert (run.output, run.scheduled_for) == ("ran", None)


def test_an_unknown_id_is_refused_with_the_known_ones(jobs):
    job("known")(lambda ctx: None)
    job("another")(lambda ctx: None)
    with pytest.raises(JobNotFound, match=r'^No job "strange" is declared\. Declared: another, known\.$'):
        trigger("strange")
    with pytest.raises(JobNotFound, match=r'^No job "knwon" is declared\. Did you mean "known"\?'):
        trigger("knwon")
    assert not Event.objects.exists()


def test_data_that_is_no_dict_is_refused(jobs):
    by_hand = job("by-hand")(lambda ctx: None)
    with pytest.raises(InvalidEvent, match='data of job "by-hand" must be a dict, not list'):
        by_hand.start([1])
    with pytest.raises(TypeError, match=r'^job "by-hand": \.user is an object, which JSON cannot hold'):
        by_hand.start({"user": object()})
    assert not Run.objects.exists()


def test_a_start_that_is_rolled_back_never_was(jobs, ledger):
    by_hand = job("by-hand")(lambda ctx: ledger.note("ran"))
    with transaction.atomic():
        by_hand.start()
        transaction.set_rollback(True)

    assert jobs.drain() == 0
    assert ledger == []
    assert not Event.objects.exists()


def test_each_start_is_a_run_of_its_own(jobs):
    by_hand = job("by-hand")(lambda ctx: ctx.event.data)

    assert by_hand.start() != by_hand.start()
    assert jobs.drain() == 2


def test_data_that_is_not_json_is_refused_with_the_path(jobs):
    by_hand = job("by-hand")(lambda ctx: None)
    with pytest.raises(TypeError, match=r"\.who is an object"):
        by_hand.start({"who": object()})
    assert not Run.objects.exists()


def test_a_higher_priority_is_worked_first(jobs, ledger):
    for priority in (0, 10, 5):

        @job(f"of-{priority}", priority=priority)
        def of_priority(ctx):
            ledger.note(ctx.job.priority)

        of_priority.start()
    jobs.drain()

    assert ledger == [10, 5, 0]

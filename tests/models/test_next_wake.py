"""When a cluster has to look again, asked in one statement."""

from datetime import timedelta

from django.db import connection
from django_q.models import Schedule

from django_jobs.broker import RunBroker
from django_jobs.models import Run, RunStatus, claim
from django_jobs.models.sql import adapt, instant
from django_jobs.scheduler import CLUSTER
from tests.models.conftest import NOON

HOUR = timedelta(hours=1)


def next_wake(jobs=("a-job",), queues=None):
    statement, parameters = claim.next_wake(Run.objects.all(), jobs=jobs, queues=queues, now=NOON)
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, value) for value in parameters])
        return instant(connection, cursor.fetchone()[0])


def test_it_is_the_earliest_time_of_any_queue_and_priority(a_run):
    a_run(wake_at=NOON + 3 * HOUR)
    a_run(wake_at=NOON + HOUR, priority=7)
    a_run(RunStatus.SLEEPING, wake_at=NOON + 2 * HOUR, queue="slow")
    a_run(RunStatus.COMPLETED)

    assert next_wake() == NOON + HOUR
    assert next_wake(queues=["slow"]) == NOON + 2 * HOUR
    assert next_wake(queues=["slow", "default"]) == NOON + HOUR
    assert next_wake(queues=["none"]) is None


def test_a_run_that_is_due_is_news_at_once(a_run):
    a_run(wake_at=NOON + HOUR)
    a_run(wake_at=NOON - HOUR)

    assert next_wake() == NOON - HOUR


def test_a_due_run_of_a_job_this_code_does_not_know_hides_no_timer(a_run):
    a_run(job_id="of-another-release", wake_at=NOON - HOUR)
    assert next_wake() is None

    a_run(wake_at=NOON + HOUR)
    assert next_wake() == NOON + HOUR
    assert next_wake(jobs=()) == NOON + HOUR


def test_the_outlook_tells_what_is_overdue_from_what_comes(a_run, django_assert_num_queries):
    Schedule.objects.all().delete()
    broker = RunBroker()
    a_run(wake_at=NOON + HOUR)
    assert broker.outlook()[1:] == (None, False, False, False)

    schedule(next_run="2999-01-01T00:00:00Z")
    schedule(next_run="2001-01-01T00:00:00Z", repeats=0)  # One that has done its share.
    assert broker.outlook().schedule.year == 2999
    assert not broker.outlook().overdue

    schedule(next_run="2001-01-01T00:00:00Z")
    with django_assert_num_queries(1):
        outlook = broker.outlook()
    assert outlook.overdue
    assert outlook.schedule.year == 2999


def schedule(repeats=-1, **fields):
    Schedule.objects.bulk_create([Schedule(func="x", cluster=CLUSTER, repeats=repeats, **fields)])

"""What goes on beside a run, a worker or a row that behaves badly."""

import os
import signal
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone
from django_q.models import Schedule, Task
from django_q.tasks import async_task

from django_jobs.models import Run, RunStatus
from django_jobs.scheduler import CLUSTER
from tests.acceptance.conftest import all_final, database_url, until
from tests.acceptance.proxy import Proxy
from tests.lab.models import Effect


def test_a_run_that_kills_its_workers_takes_no_other_run_down_with_it(runjobs, lab):
    """Six runs share one worker with it, and each needs longer than the killer does."""
    cluster = runjobs(workers=1, threads=8)
    deadly = lab.killer.start({})
    others = [lab.outside.start({"seconds": 4}) for _ in range(6)]
    until(all_final, within=60)

    deadly.refresh_from_db()
    assert (deadly.status, deadly.error["type"]) == (RunStatus.FAILED, "WorkerCrashed"), cluster.output()
    for run in others:
        run.refresh_from_db()
        assert run.status == RunStatus.COMPLETED, cluster.output()
    until(lambda: len(cluster.workers) == 1, what="the end of the worker it had to itself")


def test_crons_and_messages_do_not_wait_behind_a_backlog(runjobs, lab):
    for _ in range(300):
        lab.outside.start({"seconds": 0.1})
    soon = timezone.now() + timedelta(seconds=3)
    Schedule.objects.create(func="math.floor", args="2.5", cluster=CLUSTER, next_run=soon, name="mine")
    runjobs(workers=1, threads=2)
    until(lambda: Effect.objects.exists())
    async_task("math.ceil", 1.5, cluster=CLUSTER, save=True)

    for func in ("math.ceil", "math.floor"):
        until(lambda func=func: Task.objects.filter(func=func).exists(), within=10, what=func)
        assert not all_final(), "the backlog was gone before that showed anything"


def test_a_gate_that_raises_stops_no_cluster(runjobs, lab):
    cluster = runjobs(workers=1, LAB_BROKEN_GATE="1")
    lab.five.start({})
    until(all_final)
    assert Run.objects.get().status == RunStatus.COMPLETED
    assert "the gate broken_service raised an error and counts as open" in cluster.output()
    assert "another one takes its place" not in cluster.output()


def test_a_pusher_that_dies_as_it_is_born_does_not_end_the_cluster(runjobs, lab):
    cluster = runjobs(workers=1)
    for _ in range(4):
        os.kill(until(lambda: cluster.guard and cluster.pusher), signal.SIGKILL)
        until(lambda: len(cluster.tree()) == 4, what="another pusher")
    lab.five.start({})
    until(all_final)
    assert Run.objects.get().status == RunStatus.COMPLETED
    assert cluster.process.poll() is None


@pytest.mark.only_on("postgresql", "mysql")
def test_a_connection_that_ended_while_its_worker_was_idle_costs_no_run(runjobs, lab):
    """The database was restarted over lunch: the next run, which has no second try, does not notice."""
    proxy = Proxy(connection.settings_dict["HOST"], int(connection.settings_dict["PORT"]))
    cluster = runjobs(workers=1, threads=2, url=database_url(HOST="127.0.0.1", PORT=proxy.port))
    for _ in range(6):
        lab.strict.start({})
    until(all_final)
    proxy.cut()
    proxy.restore()
    for _ in range(6):
        lab.strict.start({})
    until(all_final)
    assert set(Run.objects.values_list("status", flat=True)) == {"completed"}, cluster.output()


@pytest.mark.only_on("postgresql", "mysql")
def test_a_run_whose_lease_ran_out_while_the_database_was_away_is_not_done_twice(runjobs, lab):
    proxy = Proxy(connection.settings_dict["HOST"], int(connection.settings_dict["PORT"]))
    runjobs(workers=1, threads=2, url=database_url(HOST="127.0.0.1", PORT=proxy.port))
    run = lab.deaf.start({"seconds": 8})
    until(lambda: Effect.objects.filter(name="begun").exists())
    proxy.cut()
    until(lambda: Run.objects.get().wake_at < timezone.now(), what="the end of the lease")
    proxy.restore()
    until(all_final)
    run.refresh_from_db()
    assert (run.status, run.passes, run.crashes) == (RunStatus.COMPLETED, 1, 0)
    assert Effect.objects.filter(name="begun").count() == 1


def test_a_step_that_hangs_is_given_up_and_its_worker_replaced(runjobs, lab):
    """It holds its thread for a minute; its run goes on elsewhere, and so do those beside it."""
    cluster = runjobs(workers=1, threads=3)
    [first] = cluster.workers
    hanging, beside = lab.hangs.start({}), lab.outside.start({"seconds": 3})
    until(all_final, within=20)

    hanging.refresh_from_db()
    beside.refresh_from_db()
    assert (hanging.status, hanging.output, hanging.crashes) == (RunStatus.COMPLETED, "done", 0), (
        cluster.output()
    )
    assert [attempt.error["type"] for attempt in hanging.attempts.all()] == ["TimeoutError"]
    assert (beside.status, beside.crashes) == (RunStatus.COMPLETED, 0)
    assert Effect.objects.filter(run=beside.pk, name="begun").count() == 1
    until(lambda: first not in cluster.tree(), what="the end of the worker with the stuck thread")

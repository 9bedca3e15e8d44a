"""What ``runjobs`` does when nobody harms it: alone, beside others, and with its database gone for a while."""

import os
import signal
import time
from collections import Counter
from datetime import timedelta

import pytest
from django.utils import timezone
from django_q.models import OrmQ, Schedule, Task
from django_q.tasks import async_task

from django_jobs import emit
from django_jobs.models import Run, RunStatus, Step, Worker
from django_jobs.scheduler import CLUSTER
from tests.acceptance.conftest import all_final, database_url, until
from tests.acceptance.proxy import Proxy
from tests.lab.models import Effect


def test_once_works_until_nothing_is_due_and_exits_0(runjobs, lab):
    runs = [lab.five.start({}) for _ in range(10)]
    sleeper = lab.nap.start({"seconds": 3600})
    cluster = runjobs("--once", wait=False)
    assert cluster.wait() == 0, cluster.output()
    assert set(Run.objects.filter(pk__in=[run.pk for run in runs]).values_list("status", flat=True)) == {
        "completed"
    }
    sleeper.refresh_from_db()
    assert sleeper.status == RunStatus.SLEEPING
    assert not Worker.objects.exists()


def test_once_with_nothing_to_do_ends(runjobs):
    cluster = runjobs("--once", wait=False)
    assert cluster.wait() == 0
    assert "Nothing is due any more." in cluster.output()


def test_the_banner_says_what_runs_where_and_what_is_kept_out(runjobs, lab):
    cluster = runjobs("--once", wait=False, CREDITS_ENABLED="False")
    assert cluster.wait() == 0
    banner = cluster.output()
    for words in ("Database", "2 processes, 4 threads each", "lab-five", "Queues    all"):
        assert words in banner
    assert "recurring-credits (pricing.credits.enabled)" in banner


def test_ctrl_c_stops_it(runjobs):
    cluster = runjobs()
    os.kill(cluster.parent, signal.SIGINT)
    assert cluster.wait(15) == 0
    assert "Stopped." in cluster.output()


def test_it_starts_again_when_the_code_changes(runjobs, lab):
    cluster = runjobs("--reload", workers=1, DEBUG="True")
    os.utime(lab.__file__)
    until(lambda: "The code has changed: starting again." in cluster.output())
    run = lab.five.start({})
    until(all_final)
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED


def test_a_worker_that_has_done_its_share_is_replaced_without_a_loss(runjobs, lab):
    cluster = runjobs(workers=2, threads=2, LAB_RECYCLE="5")
    for _ in range(60):
        lab.five.start({})
    until(all_final)
    assert set(Run.objects.values_list("status", "crashes")) == {("completed", 0)}
    assert Effect.objects.count() == 300
    assert "has done its share; another one takes its place" in cluster.output()


def test_an_unknown_queue_is_refused_with_the_known_ones(runjobs):
    cluster = runjobs("--queues", "defualt", wait=False)
    assert cluster.wait() == 2
    assert "No job is in queue defualt. Queues: default" in cluster.output()


def test_a_sleeper_wakes_when_its_time_comes(runjobs, lab):
    runjobs()
    lab.nap.start({"seconds": 2})
    until(all_final, within=10)
    assert Effect.objects.get().name == "woke"
    step = Step.objects.get(name="nap")
    assert step.finished_at >= step.wake_at


def test_two_clusters_share_2000_runs_and_run_each_once(runjobs, lab):
    for _ in range(10):
        _start_many(lab.pick_up, 200)
    first, second = runjobs(workers=1), runjobs(workers=1)
    until(all_final, within=120)
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 2000
    done = Counter(Effect.objects.values_list("run", flat=True))
    assert len(done) == 2000
    assert set(done.values()) == {1}
    by_cluster = Counter(Run.objects.values_list("claimed_by", flat=True))
    assert len(by_cluster) == 2, f"one cluster did it all: {by_cluster} {first.output()} {second.output()}"


def _start_many(job, count):
    from django.db import transaction

    with transaction.atomic():
        for _ in range(count):
            job.start({})


def test_three_clusters_start_one_run_for_a_cron_slot_beside_a_broken_schedule_of_the_host(runjobs):
    past = timezone.now() - timedelta(hours=1)
    Schedule.objects.create(func="x", args="(", schedule_type=Schedule.HOURLY, cluster=CLUSTER, next_run=past)
    for _ in range(3):
        runjobs(workers=1, threads=1, LAB_CRON="1")
    assert Schedule.objects.filter(cluster=CLUSTER, name__startswith="lab-cron").exists()
    runs = Run.objects.filter(job_id="lab-cron")
    until(runs.exists, within=65)
    until(all_final)
    slots = runs.values_list("scheduled_for", flat=True)
    assert len(slots) == len(set(slots))
    assert Effect.objects.filter(name="tick").count() == len(slots)
    for run in runs:
        assert run.scheduled_for.second == 0
        assert run.started_at >= run.scheduled_for


def test_ordinary_messages_and_schedules_of_django_q2_are_served_too(runjobs):
    Schedule.objects.create(
        func="math.floor", args="2.5", schedule_type=Schedule.ONCE, cluster=CLUSTER, name="mine"
    )
    Schedule.objects.create(
        func="math.floor", args="(", schedule_type=Schedule.ONCE, cluster=CLUSTER, name="broken"
    )
    async_task("math.ceil", 1.5, cluster=CLUSTER, save=True)
    runjobs(workers=1)
    until(lambda: Task.objects.filter(func="math.ceil").exists(), what="the message")
    assert Task.objects.get(func="math.ceil").result == 2
    until(lambda: not OrmQ.objects.exists(), what="the acknowledgement")


@pytest.mark.only_on("postgresql", "mysql")
def test_a_database_that_goes_away_for_ten_seconds_is_waited_for(runjobs, lab, settings):
    from django.db import connection

    proxy = Proxy(connection.settings_dict["HOST"], int(connection.settings_dict["PORT"]))
    cluster = runjobs(url=database_url(HOST="127.0.0.1", PORT=proxy.port))
    for _ in range(30):
        lab.five.start({"pause": 0.1})
    until(lambda: Step.objects.count() > 20)
    proxy.cut()
    time.sleep(10)
    assert "cannot be reached" in cluster.output()
    proxy.restore()
    for _ in range(5):
        lab.five.start({})
    until(all_final, within=60)
    assert "is back; going on" in cluster.output()
    assert set(Run.objects.values_list("status", flat=True)) == {"completed"}
    atomic = Counter(Effect.objects.filter(name__in=["step-1", "step-3"]).values_list("run", "name"))
    assert len(atomic) == 70
    assert set(atomic.values()) == {1}


def test_a_run_of_a_job_this_code_does_not_know_is_left_for_one_that_does(runjobs, lab):
    lab.five.start({})
    Run.objects.update(job_id="of-another-release")
    lab.five.start({})
    cluster = runjobs("--once", wait=False)
    assert cluster.wait() == 0
    assert Run.objects.get(job_id="of-another-release").status == RunStatus.QUEUED
    assert Run.objects.get(job_id="lab-five").status == RunStatus.COMPLETED


def test_an_unmigrated_database_is_refused_in_one_line(runjobs, tmp_path):
    cluster = runjobs(wait=False, url=f"sqlite:///{tmp_path}/empty.sqlite3")
    assert cluster.wait() == 1
    assert cluster.output().strip() == "CommandError: The database is not migrated. Run manage.py migrate."


def test_an_event_is_picked_up_from_another_process(runjobs, lab):
    runjobs(workers=1)
    event = emit("nobody/listens", {})
    run = lab.pick_up.start({})
    until(all_final)
    assert Effect.objects.get().run == run.pk
    assert not event.runs.exists()

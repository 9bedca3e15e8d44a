"""What is left when a process is killed, stopped or told to go, at the worst moment."""

import os
import signal
import time
from collections import Counter

from django_jobs.models import Run, RunStatus, Step, Worker
from tests.acceptance.conftest import alive, all_final, until
from tests.lab.models import Effect


def begun(name="begun"):
    return Effect.objects.filter(name=name).order_by("id").last()


def test_the_run_of_a_killed_worker_goes_on_within_two_seconds(runjobs, lab):
    runjobs(workers=2, threads=1)
    run = lab.outside.start({"seconds": 3})
    first = until(begun, what="the step")
    os.kill(first.pid, signal.SIGKILL)
    killed_at = time.time()
    second = until(lambda: Effect.objects.filter(name="begun").exclude(pk=first.pk).first(), within=5)
    assert second.at - killed_at < 2
    assert second.pid != first.pid
    until(all_final)
    run.refresh_from_db()
    assert run.status == RunStatus.COMPLETED
    assert Effect.objects.filter(name="after").count() == 1


def test_a_cluster_outlives_the_kill_of_an_idle_worker(runjobs, lab):
    """Stock django-q2 freezes here: the worker next in line dies with the queue's lock."""
    cluster = runjobs(workers=2, threads=2)
    for pid in cluster.workers:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(cluster.workers) == 2 and all(map(alive, cluster.workers)))
    for _ in range(20):
        lab.five.start({})
    until(all_final)
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 20
    assert "killed by signal 9; another one takes its place" in cluster.output()


def test_a_killed_pusher_is_replaced_and_the_work_goes_on(runjobs, lab):
    cluster = runjobs(workers=2, threads=2)
    old = cluster.pusher
    os.kill(old, signal.SIGKILL)
    for _ in range(20):
        lab.five.start({})
    until(all_final)
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 20


def test_a_killed_guard_is_replaced_and_its_children_end(runjobs, lab):
    cluster = runjobs(workers=2, threads=2)
    guard, orphans = cluster.guard, [cluster.pusher, *cluster.workers]
    os.kill(guard, signal.SIGKILL)
    until(lambda: not any(map(alive, orphans)), within=5, what="the end of the orphans")
    lab.five.start({})
    until(all_final)
    assert Run.objects.get().status == RunStatus.COMPLETED


def test_no_orphan_lives_on_when_the_parent_is_killed(runjobs, lab):
    cluster = runjobs(workers=2, threads=2)
    tree = cluster.tree()
    lab.outside.start({"seconds": 30})
    until(begun)
    os.kill(cluster.parent, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in tree), within=5, what="the end of the orphans")


def test_a_whole_tree_killed_in_the_middle_of_200_runs_loses_and_doubles_nothing(runjobs, lab):
    for _ in range(200):
        lab.five.start({})
    first = runjobs(workers=2, threads=4, wait=False)
    until(lambda: Step.objects.count() > 150, what="some steps")
    first.kill_tree()
    half_done = Run.objects.filter(status=RunStatus.RUNNING).count()
    restarted_at = time.monotonic()
    runjobs(workers=2, threads=4)
    until(all_final, within=60)
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 200
    assert Step.objects.count() == 1000
    atomic = Counter(Effect.objects.filter(name__in=["step-1", "step-3"]).values_list("run", "name"))
    assert len(atomic) == 400
    assert set(atomic.values()) == {1}
    plain = Counter(Effect.objects.filter(name__in=["step-0", "step-2", "step-4"]).values_list("run", "name"))
    assert len(plain) == 600
    # At least once: only a step in hand at the kill may have run again.
    assert sum(plain.values()) - 600 <= half_done
    assert time.monotonic() - restarted_at < 60


def test_sigterm_to_the_process_group_stops_cleanly_and_counts_as_no_failure(runjobs, lab):
    cluster = runjobs(workers=2, threads=2)
    runs = [lab.five.start({"pause": 0.4}) for _ in range(4)]
    until(lambda: Step.objects.count() >= 4)
    cluster.terminate_group()
    assert cluster.wait(15) == 0, cluster.output()
    assert not Worker.objects.exists()
    for run in runs:
        run.refresh_from_db()
        assert run.status == RunStatus.QUEUED, cluster.output()
        assert (run.attempt, run.crashes, run.attempts.count()) == (0, 0, 0)
    runjobs(workers=2, threads=2)
    until(all_final)
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 4
    assert Effect.objects.count() == 20, "a finished step was done again"


def test_a_step_longer_than_the_grace_is_cut_off_and_its_run_handed_back(runjobs, lab):
    cluster = runjobs("--grace", 1, workers=1, threads=1)
    run = lab.outside.start({"seconds": 60})
    until(begun)
    asked_at = time.monotonic()
    cluster.terminate_group()
    assert cluster.wait(15) == 0
    assert time.monotonic() - asked_at < 6
    run.refresh_from_db()
    assert (run.status, run.crashes) == (RunStatus.QUEUED, 0)


def test_a_second_signal_stops_at_once(runjobs, lab):
    cluster = runjobs("--grace", 60, workers=1, threads=1)
    run = lab.outside.start({"seconds": 60})
    until(begun)
    cluster.terminate_group()
    time.sleep(0.6)
    cluster.terminate_group()
    assert cluster.wait(10) == 1
    run.refresh_from_db()
    assert run.status == RunStatus.QUEUED


def test_a_worker_stopped_past_its_lease_and_woken_again_writes_nothing(runjobs, lab):
    cluster = runjobs(workers=2, threads=1)
    run = lab.outside.start({"seconds": 1})
    first = until(begun)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        until(all_final, within=20, what="the takeover")
        before = list(Step.objects.values())
        ended = Run.objects.values().get()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    until(lambda: "no longer holds run" in cluster.output(), what="the old worker's notice")
    assert list(Step.objects.values()) == before
    assert Run.objects.values().get() == ended
    assert run.pk == ended["id"]
    assert Effect.objects.filter(name="after").count() == 1


def test_eight_threads_wait_for_the_outside_side_by_side(runjobs, lab):
    runjobs(workers=1, threads=8)
    for _ in range(8):
        lab.outside.start({"seconds": 1})
    until(lambda: Effect.objects.filter(name="done").count() == 8)
    times = Effect.objects.filter(name__in=["begun", "done"]).values_list("at", flat=True)
    assert max(times) - min(times) < 2


def test_a_kill_while_eight_threads_wait_loses_none(runjobs, lab):
    runjobs(workers=1, threads=8)
    for _ in range(8):
        lab.outside.start({"seconds": 1})
    until(lambda: Effect.objects.filter(name="begun").count() == 8)
    os.kill(begun().pid, signal.SIGKILL)
    until(all_final)
    assert Run.objects.filter(status=RunStatus.COMPLETED).count() == 8
    assert Effect.objects.filter(name="after").count() == 8

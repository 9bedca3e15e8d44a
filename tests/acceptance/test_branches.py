"""Branches in a real worker: they wait side by side, and a kill costs only those that were not done."""

import os
import signal
from collections import Counter
from datetime import timedelta

import pytest

from django_jobs.models import Run, RunStatus, Step
from tests.acceptance.conftest import all_final, until
from tests.lab.models import Effect


@pytest.mark.parametrize("name", ["side_by_side", "awaits"])
def test_fifty_branches_of_100_ms_take_little_more_than_one(name, runjobs, lab, request):
    runjobs(workers=1, threads=1)
    getattr(lab, name).start({"branches": 2, "seconds": 0.0})  # The worker has its connection then.
    until(all_final)
    run = getattr(lab, name).start({"branches": 50, "seconds": 0.1})
    until(all_final)
    run.refresh_from_db()

    assert (run.status, run.output, run.passes) == (RunStatus.COMPLETED, 50, 1)
    assert run.steps.count() == 50
    took = run.finished_at - run.started_at
    print(f"{request.node.name}: {took / timedelta(milliseconds=1):.0f} ms")
    assert took < timedelta(seconds=2)  # One after the other it would be five.


def test_a_kill_in_the_middle_repeats_only_the_branches_that_were_not_done(runjobs, lab):
    runjobs(workers=2, threads=1)
    quick, slow = range(4), range(4, 8)
    run = lab.branches.start({"seconds": [0 for _ in quick] + [2 for _ in slow]})
    until(lambda: Step.objects.count() == len(quick), what="the quick branches")
    until(lambda: Effect.objects.count() == len(quick) + len(slow), what="the slow ones to begin")
    os.kill(Effect.objects.first().pid, signal.SIGKILL)
    until(all_final)

    run.refresh_from_db()
    assert (run.status, run.output, run.passes) == (RunStatus.COMPLETED, 8, 2)
    begun = Counter(Effect.objects.values_list("name", flat=True))
    assert begun == {f"begun-{n}": 1 for n in quick} | {f"begun-{n}": 2 for n in slow}
    assert Run.objects.count() == 1

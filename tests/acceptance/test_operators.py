"""What operators do to a cluster at work."""

from django_jobs import services
from django_jobs.models import Run, RunStatus
from tests.acceptance.conftest import until


def status(run):
    return Run.objects.get(pk=run.pk).status


def ended(run):
    return status(run) == RunStatus.COMPLETED


def test_a_cluster_leaves_the_runs_of_a_paused_job_until_it_is_resumed(runjobs, lab):
    services.pause("lab-nothing")
    held = lab.nothing.start({})
    runjobs(workers=1)
    other = lab.five.start({})
    until(lambda: ended(other))
    assert status(held) == RunStatus.QUEUED

    services.resume("lab-nothing")
    until(lambda: ended(held), what="the end of the run that was held")


def test_a_cluster_at_work_hears_of_a_pause(runjobs, lab):
    runjobs(workers=1)
    first = lab.nothing.start({})
    until(lambda: ended(first))
    services.pause("lab-nothing", mode="skip")

    def is_held():
        run, other = lab.nothing.start({}), lab.nap.start({"seconds": 0})
        until(lambda: ended(other))
        return not ended(run) and run

    held = until(is_held, within=10, what="the pause")
    until(lambda: status(held) == RunStatus.SKIPPED, what="the end of the run that came meanwhile")


def test_a_cluster_works_off_an_operation(runjobs, lab):
    runs = [lab.nap.start({"seconds": 3600}) for _ in range(120)]
    cluster = runjobs(workers=2)
    until(lambda: not Run.objects.exclude(status="sleeping").exists())

    operation = services.bulk(
        "cancel", {"job": "lab-nap", "status": "sleeping"}, reason="enough", actor="ada"
    )

    def is_over():
        operation.refresh_from_db()
        return operation.status == "completed"

    until(is_over, what="the end of the operation")
    assert (operation.done, operation.skipped, operation.failed) == (120, 0, 0), cluster.output()
    assert {status(run) for run in runs} == {RunStatus.CANCELLED}

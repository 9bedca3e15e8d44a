"""A map is a step for each item, side by side; only items without a checkpoint work."""

import threading
from collections import Counter
from datetime import timedelta

import pytest

from django_jobs import NonRetriableError, StepError, branches, job
from django_jobs.executor import execute
from django_jobs.models import Run, RunStatus

DAY = timedelta(days=1)
SOON = [timedelta(seconds=5)]

in_threads = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=[pytest.param("threads", marks=in_threads), pytest.param("inline")])
def either_way(request):
    """Once in real threads, and once inline under the test's transaction."""
    return request.param


def fresh(run):
    return Run.objects.get(pk=run.pk)


def names(run):
    return sorted(run.steps.values_list("name", flat=True))


def test_the_results_come_in_the_order_of_the_items(jobs, either_way, ledger):
    @job("maps")
    def maps(ctx):
        return ctx.step.map("double", lambda n: ledger.note(n, n * 2), [3, 1, 2])

    run = jobs.run(maps)

    assert run.output == [6, 2, 4]
    assert sorted(ledger) == [1, 2, 3]
    assert names(run) == ["double-0", "double-1", "double-2"]


def test_a_key_names_the_steps(jobs, either_way):
    @job("maps")
    def maps(ctx):
        users = [{"id": 7, "n": 1}, {"id": 9, "n": 2}]
        return ctx.step.map("mail", lambda user: user["n"], users, key=lambda user: user["id"])

    run = jobs.run(maps)

    assert run.output == [1, 2]
    assert {step.name: step.output for step in run.steps.all()} == {"mail-7": 1, "mail-9": 2}


def test_items_may_be_any_iterable_and_none_at_all(jobs, either_way):
    @job("maps")
    def maps(ctx):
        return [
            ctx.step.map("a", str, (n for n in range(3))),
            ctx.step.map("b", str, []),
            ctx.step.map("c", str, "x"),
        ]

    assert jobs.run(maps).output == [["0", "1", "2"], [], ["x"]]


def test_two_items_of_one_key_are_refused_before_anything_works(jobs, either_way, ledger):
    @job("maps")
    def maps(ctx):
        ctx.step.map("mail", ledger.note, [1, 2, 3], key=lambda n: n % 2)

    run = jobs.run(maps)

    assert run.status == RunStatus.FAILED
    assert 'Two items of map "mail" have the same key: both would be step "mail-1"' in run.error["message"]
    assert (ledger, run.attempts.count()) == ([], 1)


def test_a_key_that_makes_no_step_name_is_refused(jobs, ledger):
    run = jobs.run(job("maps")(lambda ctx: ctx.step.map("m", ledger.note, [1], key=lambda n: "x" * 200)))

    assert "A step name is a string of 1 to 190 characters" in run.error["message"]
    assert ledger == []


@pytest.mark.parametrize("limit", [0, True, "2", None])
def test_a_wrong_limit_is_told(limit, jobs):
    run = jobs.run(job("maps")(lambda ctx: ctx.step.map("m", str, [1], limit=limit)))
    assert f"limit is a whole number above zero, not {limit!r}" in run.error["message"]


def test_a_thousand_items_are_a_thousand_steps_each_worked_once(jobs, either_way, ledger):
    @job("maps")
    def maps(ctx):
        squares = ctx.step.map("square", lambda n: ledger.note(n, n * n), range(1000))
        ctx.step.sleep("night", DAY)
        return sum(squares)

    run = jobs.run(maps)
    jobs.advance(DAY)

    assert (fresh(run).status, fresh(run).output) == (RunStatus.COMPLETED, sum(n * n for n in range(1000)))
    assert sorted(ledger) == list(range(1000))
    assert run.steps.count() == 1001


@in_threads
def test_a_map_that_is_only_replayed_starts_no_threads(jobs, monkeypatch):
    @job("maps")
    def maps(ctx):
        ctx.step.map("s", str, range(5))
        ctx.step.sleep("night", DAY)

    run = jobs.run(maps)
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread was started"))
    jobs.advance(DAY)

    assert fresh(run).status == RunStatus.COMPLETED


def test_items_may_be_appended_while_the_run_sleeps(jobs, either_way, ledger):
    items = [1, 2]

    @job("maps")
    def maps(ctx):
        first = ctx.step.map("s", lambda n: ledger.note(n, n), items)
        ctx.step.sleep("night", DAY)
        return first

    run = jobs.run(maps)
    items.append(3)
    jobs.advance(DAY)

    assert fresh(run).output == [1, 2, 3]
    assert ledger.count(3) == 1
    assert len(ledger) == 3


def test_with_a_key_items_may_come_go_and_change_places(jobs, either_way, ledger):
    items = ["a", "b", "c"]

    @job("maps")
    def maps(ctx):
        found = ctx.step.map("s", lambda x: ledger.note(x, x * 2), items, key=str)
        ctx.step.sleep("night", DAY)
        return found

    run = jobs.run(maps)
    items[:] = ["d", "c", "a"]
    jobs.advance(DAY)

    assert fresh(run).output == ["dd", "cc", "aa"]
    assert sorted(ledger) == ["a", "b", "c", "d"]


def test_items_that_fail_are_tried_again_and_the_others_are_not(jobs, either_way):
    tries = Counter()

    def work(n):
        tries[n] += 1
        if n == 2 and tries[n] < 3:
            raise ConnectionError
        return n

    @job("maps", backoff=SOON)
    def maps(ctx):
        return ctx.step.map("s", work, range(4))

    run = jobs.run(maps)
    jobs.advance(DAY)

    assert fresh(run).output == [0, 1, 2, 3]
    assert tries == {0: 1, 1: 1, 2: 3, 3: 1}


def test_the_first_item_that_fails_for_good_is_raised_when_all_have_ended(jobs, either_way, ledger):
    def work(n):
        ledger.note(n)
        if n in (3, 1):
            raise NonRetriableError(f"no {n}")

    @job("maps")
    def maps(ctx):
        try:
            ctx.step.map("s", work, range(5))
        except StepError as error:
            return error.step, error.message

    run = jobs.run(maps)

    assert run.output == ("s-1", "no 1")
    assert sorted(ledger) == [0, 1, 2, 3, 4]


def test_its_steps_follow_the_policy_given(jobs, either_way):
    @job("maps")
    def maps(ctx):
        ctx.step.using(retries=0).map("s", int, ["1", "x"])

    run = jobs.run(maps)
    assert (run.status, run.attempts.count()) == (RunStatus.FAILED, 1)


def test_the_same_map_again_is_other_steps(jobs, either_way, ledger):
    @job("maps")
    def maps(ctx):
        return [ctx.step.map("s", lambda n: ledger.note(n, n), items) for items in ([1, 2], [3, 4])]

    run = jobs.run(maps)

    assert run.output == [[1, 2], [3, 4]]
    assert names(run) == ["s-0", "s-0#2", "s-1", "s-1#2"]


def test_a_step_inside_an_item_is_refused(jobs, either_way, ledger):
    @job("maps")
    def maps(ctx):
        ctx.step.map("outer", lambda n: ctx.step.run("inner", ledger.note, n), [1, 2])

    run = jobs.run(maps)

    assert 'Step "inner" is called inside step "outer-0"' in run.error["message"]
    assert ledger == []


def test_a_worker_that_stops_begins_no_more_items(jobs, either_way, ledger):
    @job("maps")
    def maps(ctx):
        return ctx.step.map("s", lambda n: ledger.note(n, n), range(50), limit=2)

    maps.start()
    [run] = Run.objects.claim(1, jobs=["maps"])
    execute(run, stopping=lambda: bool(ledger))

    assert fresh(run).status == RunStatus.QUEUED
    assert 1 <= len(ledger) <= 2
    jobs.drain()
    assert fresh(run).output == list(range(50))
    assert sorted(ledger) == list(range(50))


@in_threads
def test_a_short_item_does_not_wait_for_the_one_before_it(jobs, monkeypatch):
    """They have their names already, so nothing holds the next one up."""
    monkeypatch.setattr(branches, "PATIENCE", 60)
    ended = threading.Event()

    def work(n):
        if n == 0:
            assert ended.wait(10)
        elif n == 9:
            ended.set()
        return n

    run = jobs.run(job("maps")(lambda ctx: ctx.step.map("s", work, range(10), limit=2)))
    assert run.output == list(range(10))


def test_a_log_line_of_an_item_is_said(jobs, either_way, caplog):
    @job("maps")
    def maps(ctx):
        ctx.step.sleep("night", DAY)
        ctx.step.map("s", lambda n: ctx.logger.warning("item %s", n), range(3))

    jobs.run(maps)
    jobs.advance(DAY)

    said = [record.getMessage() for record in caplog.records if record.name == "django_jobs.job.maps"]
    assert sorted(said) == ["item 0", "item 1", "item 2"]

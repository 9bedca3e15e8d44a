"""
Branches side by side: each its own line of steps, and together they end as one after the other would.

In a worker they run in threads; in a test case, whose transaction other threads cannot see into, one after
the other. Most of what is true of the one is true of the other.
"""

import contextvars
import itertools
import threading
from collections import Counter
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext, override_settings

from django_jobs import Backoff, NonRetriableError, StepError, branches, emit, job, on, services
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.models import Run, RunStatus, Step

DAY = timedelta(days=1)
SOON = [timedelta(seconds=5)]

in_threads = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=[pytest.param("threads", marks=in_threads), pytest.param("inline")])
def either_way(request):
    """Once in real threads, and once inline under the test's transaction."""
    return request.param


@pytest.fixture
def worked(ledger):
    """Note that something was worked on, and by which thread."""

    def note(what, result=None):
        ledger.append(what)
        ledger.threads.add(threading.get_ident())
        return result

    ledger.threads = set()
    return note


def names(run):
    return sorted(run.steps.values_list("name", flat=True))


def outputs(run):
    return {step.name: step.output for step in run.steps.all()}


def fresh(run):
    return Run.objects.get(pk=run.pk)


# Results.


def test_the_values_come_in_the_order_of_the_branches(jobs, either_way, worked, ledger):
    @job("fork")
    def fork(ctx):
        return ctx.step.parallel(*[lambda n=n: ctx.step.run(f"s{n}", worked, n, n * n) for n in range(5)])

    run = jobs.run(fork)

    assert (run.status, run.output, run.passes) == (RunStatus.COMPLETED, [0, 1, 4, 9, 16], 1)
    assert sorted(ledger) == [0, 1, 2, 3, 4]
    here = threading.get_ident()
    assert (ledger.threads == {here}) == (either_way == "inline")


@in_threads
def test_the_values_come_in_order_whichever_branch_ends_first(jobs):
    last_has_ended = threading.Event()

    @job("fork")
    def fork(ctx):
        return ctx.step.parallel(
            lambda: ctx.step.run("a", lambda: last_has_ended.wait(10) and "first"),
            lambda: ctx.step.run("b", lambda: last_has_ended.set() or "last"),
        )

    assert jobs.run(fork).output == ["first", "last"]


def test_a_branch_need_not_have_a_step(jobs, either_way):
    @job("fork")
    def fork(ctx):
        return ctx.step.parallel(lambda: 1, lambda: ctx.step.run("two", lambda: 2), lambda: None)

    assert jobs.run(fork).output == [1, 2, None]


def test_no_branches_are_no_values(jobs, either_way):
    assert jobs.run(job("fork")(lambda ctx: ctx.step.parallel())).output == []


def test_several_runs_fork_at_once(jobs, either_way, at_once):
    """Each in a thread of a worker, as there; inline they take turns."""

    @job("fork")
    def fork(ctx):
        n = ctx.event.data["n"]
        return ctx.step.parallel(*[lambda m=m: ctx.step.run("mul", lambda: n * m) for m in range(4)])

    for n in range(6):
        fork.start({"n": n})
    if either_way == "inline":
        jobs.drain()
    else:
        claimed = Run.objects.claim(6, jobs=["fork"])
        at_once(lambda: execute(claimed.pop()), threads=6)

    assert sorted(run.output for run in Run.objects.all()) == [[0, n, 2 * n, 3 * n] for n in range(6)]


# What a branch may do.


def test_branches_sleep_wait_and_work(jobs, either_way, ledger):
    @job("fork")
    def fork(ctx):
        def napper():
            ctx.step.sleep("nap", DAY)
            return ctx.step.run("same", ledger.note, "napped", 1)

        def waiter():
            event = ctx.step.wait_for_event("event", "a/b", timeout=3 * DAY)
            return ctx.step.run("same", ledger.note, "waited", event.data["n"])

        return ctx.step.parallel(napper, waiter, lambda: ctx.step.run("same", ledger.note, "worked", 3))

    run = jobs.run(fork)
    assert (run.status, ledger) == (RunStatus.SLEEPING, ["worked"])
    jobs.advance(2 * DAY)
    assert ledger == ["worked", "napped"]
    emit("a/b", {"n": 2})
    jobs.drain()

    assert fresh(run).output == [1, 2, 3]
    assert ledger == ["worked", "napped", "waited"]


def test_the_run_wakes_at_the_earliest_time_of_its_branches(jobs, either_way):
    @job("fork")
    def fork(ctx):
        ctx.step.parallel(*[lambda d=d: ctx.step.sleep(f"nap-{d}", d * DAY) for d in (3, 1, 2)])

    run = jobs.run(fork)

    for day in (1, 2, 3):
        assert fresh(run).wake_at == run.queued_at + day * DAY
        jobs.advance(DAY)
    assert (fresh(run).status, fresh(run).passes) == (RunStatus.COMPLETED, 4)


def test_all_tools_work_in_branches(jobs, either_way, rows):
    child = job("child")(lambda ctx: ctx.event.data["n"] + 1)

    @job("fork")
    def fork(ctx):
        def first():
            return ctx.step.atomic("write", rows.add, "row")

        def second():
            ctx.step.emit("tell", "a/b", {"n": 1})
            ctx.step.sleep_until("until", ctx.now + DAY)
            return ctx.step.invoke("child", child, {"n": 1})

        def third():
            return ctx.step.wait_for_event("hear", "a/b", timeout=DAY).data["n"]

        def fourth():
            return ctx.step.map("each", lambda n: -n, [1, 2])

        return ctx.step.parallel(first, second, third, fourth)

    run = jobs.run(fork)
    jobs.advance(DAY)

    assert fresh(run).output == ["row", 2, 1, [-1, -2]]
    assert rows.names() == ["row"]
    assert len(jobs.emitted("a/b")) == 1
    assert run.children.get().job_id == "child"


def test_branches_have_branches(jobs, either_way):
    @job("fork")
    def fork(ctx):
        def inner(a, b):
            ctx.step.sleep("nap", (a + b + 1) * DAY)
            return ctx.step.run("work", lambda: (a, b))

        def outer(a):
            before = ctx.step.run("before", lambda: a)
            return before, ctx.step.parallel(*[lambda b=b: inner(a, b) for b in range(2)])

        return ctx.step.parallel(*[lambda a=a: outer(a) for a in range(3)])

    run = jobs.run(fork)
    jobs.advance(5 * DAY)

    assert fresh(run).output == [(a, [(a, 0), (a, 1)]) for a in range(3)]
    assert run.steps.count() == 3 + 6 + 6


def test_one_parallel_follows_another(jobs, either_way):
    @job("fork")
    def fork(ctx):
        seen = []
        for turn in range(3):
            seen += ctx.step.parallel(
                *[lambda n=n, turn=turn: ctx.step.run("s", int, f"{turn}{n}") for n in (0, 1)]
            )
            ctx.step.sleep("nap", DAY)
        return seen

    run = jobs.run(fork)
    jobs.advance(3 * DAY)

    assert fresh(run).output == [0, 1, 10, 11, 20, 21]
    assert names(run) == sorted(["s", *(f"s#{n}" for n in range(2, 7)), "nap", "nap#2", "nap#3"])


# Names.


def test_equal_names_are_numbered_in_the_order_of_the_branches(jobs, either_way):
    @job("fork")
    def fork(ctx):
        ctx.step.run("s", lambda: "before")
        ctx.step.parallel(*[lambda n=n: ctx.step.run("s", lambda: n) for n in range(3)])
        ctx.step.run("s", lambda: "after")

    assert outputs(jobs.run(fork)) == {"s": "before", "s#2": 0, "s#3": 1, "s#4": 2, "s#5": "after"}


def test_names_that_are_used_again_in_a_branch_are_numbered_on(jobs):
    @job("fork")
    def fork(ctx):
        ctx.step.parallel(*[lambda b=b: [ctx.step.run("s", lambda: b) for _ in range(2)] for b in "ab"])

    assert outputs(jobs.run(fork)) == {"s": "a", "s#2": "a", "s#3": "b", "s#4": "b"}


class Turns:
    """Have the steps of branches come to their end in a given order."""

    def __init__(self, order):
        self.order = list(order)
        self.moved = threading.Condition()

    def take(self, who):
        with self.moved:
            assert self.moved.wait_for(lambda: self.order[0] == who, 10)
            self.order.pop(0)
            self.moved.notify_all()
        return who


@in_threads
@pytest.mark.parametrize("order", [*itertools.permutations("abc")], ids="".join)
def test_each_branch_finds_its_own_checkpoints_whatever_the_timing(order, jobs):
    """The second steps get their names as they come, and each has a name and a place of its own all the same."""
    begun = threading.Barrier(3)
    turns = Turns(order)
    seen = []

    @job("fork")
    def fork(ctx):
        def branch(who):
            first = ctx.step.run("first", lambda: [begun.wait(10), turns.take(who)][1])
            second = ctx.step.run("second", lambda: who * 2)
            ctx.step.sleep("night", DAY)
            return first, second

        seen.append(ctx.step.parallel(*[lambda who=who: branch(who) for who in "abc"]))
        ctx.step.sleep("end", DAY)

    run = jobs.run(fork)
    before = outputs(run)
    jobs.advance(2 * DAY)

    assert fresh(run).status == RunStatus.COMPLETED
    assert seen == [[("a", "aa"), ("b", "bb"), ("c", "cc")]] * 2
    assert (before["first"], before["first#2"], before["first#3"]) == ("a", "b", "c")
    assert sorted(before[name] for name in ("second", "second#2", "second#3")) == ["aa", "bb", "cc"]
    assert before.items() <= (outputs(run) | {"night": None}).items()


@in_threads
def test_a_branch_that_is_long_in_coming_to_its_first_step_does_not_hold_up_the_others(jobs, monkeypatch):
    monkeypatch.setattr(branches, "PATIENCE", 0.01)
    other_has_ended = threading.Event()

    @job("fork")
    def fork(ctx):
        def slow():
            assert other_has_ended.wait(10)
            return ctx.step.run("s", lambda: "slow")

        return ctx.step.parallel(slow, lambda: ctx.step.run("s", lambda: other_has_ended.set() or "quick"))

    run = jobs.run(fork)
    assert run.output == ["slow", "quick"]
    assert outputs(run) == {"s": "quick", "s#2": "slow"}


def test_a_branch_may_be_added_at_the_end_while_a_run_is_open(jobs, either_way, ledger):
    letters = ["a", "b"]

    @job("fork")
    def fork(ctx):
        def branch(letter):
            ctx.step.sleep("nap", DAY)
            return ctx.step.run("s", ledger.note, letter, letter)

        return ctx.step.parallel(*[lambda letter=letter: branch(letter) for letter in letters])

    run = jobs.run(fork)
    letters.append("c")
    jobs.advance(2 * DAY)

    assert fresh(run).output == ["a", "b", "c"]
    assert sorted(ledger) == ["a", "b", "c"]


# Failure.


def test_the_others_go_on_when_one_fails_and_the_first_error_is_raised_when_all_have_ended(
    jobs, either_way, ledger
):
    @job("fork", retries=0)
    def fork(ctx):
        def napper():
            ctx.step.sleep("nap", DAY)
            ctx.step.run("after", ledger.note, "after")

        def fail(name):
            ctx.step.run(name, int, name)

        return ctx.step.parallel(
            lambda: ctx.step.run("fine", ledger.note, "fine"), lambda: fail("x"), lambda: fail("y"), napper
        )

    run = jobs.run(fork)
    assert (run.status, ledger) == (RunStatus.SLEEPING, ["fine"])
    jobs.advance(DAY)

    run = fresh(run)
    assert (run.status, run.error["type"]) == (RunStatus.FAILED, "StepError")
    assert 'Step "x" failed' in run.error["message"]
    assert ledger == ["fine", "after"]
    assert run.attempts.count() == 2


def test_an_error_between_the_steps_of_a_branch_is_tried_again(jobs, either_way, ledger):
    tries = Counter()

    @job("fork", retries=1, backoff=SOON)
    def fork(ctx):
        def stumbles():
            ctx.step.run("before", ledger.note, "before")
            tries["stumbles"] += 1
            if tries["stumbles"] == 1:
                raise ConnectionError("once")
            return ctx.step.run("after", ledger.note, "after", "fine")

        return ctx.step.parallel(stumbles, lambda: ctx.step.run("other", ledger.note, "other"))

    run = jobs.run(fork)
    assert (run.status, run.attempt) == (RunStatus.QUEUED, 1)
    jobs.advance(SOON[0])

    assert fresh(run).output == ["fine", None]
    assert sorted(ledger) == ["after", "before", "other"]


def test_each_branch_retries_by_itself(jobs, either_way):
    tries = Counter()

    def flaky(who, times):
        tries[who] += 1
        if tries[who] <= times:
            raise ConnectionError(who)
        return who

    @job("fork", backoff=Backoff(first=timedelta(seconds=10), jitter=0))
    def fork(ctx):
        return ctx.step.parallel(
            *[lambda w=w, t=t: ctx.step.run(w, flaky, w, t) for w, t in (("a", 0), ("b", 1), ("c", 2))]
        )

    run = jobs.run(fork)
    assert (run.status, run.wake_at) == (RunStatus.QUEUED, run.queued_at + timedelta(seconds=10))
    jobs.advance(timedelta(minutes=2))

    assert fresh(run).output == ["a", "b", "c"]
    assert tries == {"a": 1, "b": 2, "c": 3}
    assert sorted(run.steps.values_list("name", "attempts")) == [("a", 1), ("b", 2), ("c", 3)]


def test_a_branch_may_catch_what_fails_in_it(jobs, either_way):
    @job("fork", retries=0)
    def fork(ctx):
        def careful():
            try:
                ctx.step.run("bad", int, "x")
            except StepError:
                return ctx.step.run("instead", lambda: "instead")

        return ctx.step.parallel(careful, lambda: ctx.step.run("good", lambda: "good"))

    assert jobs.run(fork).output == ["instead", "good"]


def test_the_job_may_catch_what_a_branch_failed_with(jobs, either_way):
    @job("fork", retries=0)
    def fork(ctx):
        try:
            ctx.step.parallel(lambda: ctx.step.run("bad", int, "x"), lambda: ctx.step.run("good", int))
        except StepError as error:
            return ctx.step.run("undo", str, error.step)

    assert jobs.run(fork).output == "bad"


@pytest.mark.parametrize("goes_on", [False, True], ids=["returns", "calls a step"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_branch_that_swallows_an_interrupt_fails_the_run_and_names_the_step(
    depth, goes_on, jobs, either_way, ledger
):
    @job("fork")
    def fork(ctx):
        def swallows():
            try:
                ctx.step.sleep("night", DAY)
            except BaseException:
                ledger.note("caught")
            if goes_on:
                ctx.step.run("next", ledger.note, "next")

        def nested():
            ctx.step.parallel(lambda: ctx.step.run("fine", int), swallows)

        branch = swallows if depth == 1 else nested
        ctx.step.parallel(lambda: ctx.step.sleep("another", DAY), branch)

    run = jobs.run(fork)

    assert run.status == RunStatus.FAILED
    assert 'control interrupt of step "night"' in run.error["message"]
    assert ledger == ["caught"]


def test_a_job_that_swallows_the_interrupt_of_its_branches_is_told(jobs, either_way):
    @job("fork")
    def fork(ctx):
        try:
            ctx.step.parallel(lambda: ctx.step.sleep("night", DAY), lambda: None)
        except BaseException:
            return "never mind"

    run = jobs.run(fork)
    assert (run.status, 'step "night"' in run.error["message"]) == (RunStatus.FAILED, True)


def test_parallel_inside_a_step_is_refused(jobs, either_way, ledger):
    @job("fork")
    def fork(ctx):
        def inner():
            return ctx.step.parallel(*[lambda: ctx.step.run("inner", ledger.note, "inner")] * 2)

        ctx.step.run("outer", inner)

    run = jobs.run(fork)
    assert 'is called inside step "outer"' in run.error["message"]
    assert ledger == []


@pytest.mark.parametrize("limit", [0, -1, True, "2", None, 1.5])
def test_a_wrong_limit_is_told(limit, jobs):
    run = jobs.run(job("fork")(lambda ctx: ctx.step.parallel(limit=limit)))
    assert f"limit is a whole number above zero, not {limit!r}" in run.error["message"]


def test_a_branch_that_is_no_function_is_told(jobs, ledger):
    @job("fork")
    def fork(ctx):
        ctx.step.parallel(lambda: ctx.step.run("a", ledger.note, "a"), ctx.step.run("b", str, "b"))

    run = jobs.run(fork)
    assert (run.status, run.attempts.count()) == (RunStatus.FAILED, 1)
    assert (
        "A branch of parallel is a function without arguments, not 'b'. Write lambda:" in run.error["message"]
    )
    assert ledger == []


# The end of a pass in the middle.


def test_a_worker_that_stops_begins_no_more_steps_and_hands_the_run_back(jobs, either_way, ledger):
    told = []

    @job("fork")
    def fork(ctx):
        def branch(n):
            ctx.step.run(f"first-{n}", lambda: ledger.note(n) or told.append(True))
            return ctx.step.run(f"second-{n}", ledger.note, n + 10)

        return ctx.step.parallel(*[lambda n=n: branch(n) for n in range(20)], limit=2)

    fork.start()
    [run] = Run.objects.claim(1, jobs=["fork"])
    execute(run, stopping=lambda: bool(told))

    assert (fresh(run).status, fresh(run).crashes) == (RunStatus.QUEUED, 0)
    assert 1 <= len(ledger) <= 2
    assert sorted(names(run)) == sorted(f"first-{n}" for n in ledger)

    jobs.drain()
    assert fresh(run).status == RunStatus.COMPLETED
    assert Counter(ledger) == Counter([*range(20), *range(10, 30)])


@in_threads
def test_a_worker_that_loses_its_lease_in_one_branch_works_on_nothing_more(jobs, at_once, ledger):
    lost, begun = threading.Event(), threading.Event()

    def lose():
        begun.wait(10)
        jobs._now += timedelta(seconds=conf.LEASE_SECONDS)
        at_once(lambda: Run.objects.claim(1, jobs=["fork"], worker="second"), threads=1)
        lost.set()
        return ledger.note("lost")

    @job("fork")
    def fork(ctx):
        def branch(n):
            ctx.step.run("s", lambda: [begun.set(), lost.wait(10), ledger.note(n)])

        return ctx.step.parallel(
            lambda: ctx.step.run("lose", lose), *[lambda n=n: branch(n) for n in range(20)], limit=2
        )

    fork.start()
    [run] = Run.objects.claim(1, jobs=["fork"], worker="first")
    execute(run)

    assert (fresh(run).status, fresh(run).claimed_by) == (RunStatus.RUNNING, "second")
    assert not run.steps.exists()
    assert set(ledger) == {"lost", 0}  # The two that were in hand.


def test_a_cancelled_run_begins_no_more_steps(jobs, either_way, at_once, ledger):
    def cancel():
        if either_way == "inline":
            return services.cancel(Run.objects.get(), "not wanted").pk
        return at_once(lambda: services.cancel(Run.objects.get(), "not wanted").pk, threads=1)

    answers = []

    @job("fork")
    def fork(ctx):
        def branch(n):
            ctx.step.run(f"s{n}", ledger.note, n)

        def cancelled():
            answers.append(ctx.cancelled())
            ctx.step.run("cancel", cancel)

        try:
            ctx.step.parallel(cancelled, *[lambda n=n: branch(n) for n in range(10)], limit=1)
        finally:
            answers.append(ctx.cancelled())

    run = jobs.run(fork)

    assert (run.status, run.reason) == (RunStatus.CANCELLED, "not wanted")
    assert not run.steps.exists()
    assert ledger == []
    assert answers == [False, True]


# Crashes.


def test_a_worker_may_die_anywhere_and_only_branches_that_were_not_done_are_repeated(jobs, rows, ledger):
    @job("fork", backoff=SOON)
    def fork(ctx):
        def napper():
            ctx.step.atomic("atomic", rows.add, f"one {ctx.run_id}")
            ctx.step.sleep("nap", DAY)
            return ctx.step.run("napped", ledger.note, (ctx.run_id, "napped"), 1)

        def worker():
            return ctx.step.run("worked", ledger.note, (ctx.run_id, "worked"), 2)

        def catcher():
            try:
                ctx.step.using(retries=0).run("bad", int, "x")
            except StepError:
                return ctx.step.atomic("instead", rows.add, f"two {ctx.run_id}") and 3

        first = ctx.step.parallel(napper, worker, catcher)
        return first, ctx.step.map("each", lambda n: ledger.note((ctx.run_id, n), -n), [1, 2, 3])

    boundaries, repeated = 0, []
    for run in jobs.crash_everywhere(fork):
        boundaries += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, ([1, 2, 3], [-1, -2, -3])), run.error
        assert [rows.names().count(f"{n} {run.pk}") for n in ("one", "two")] == [1, 1]
        done = Counter(what for pk, what in ledger if pk == run.pk)
        assert set(done) == {"napped", "worked", 1, 2, 3}
        repeated.append(sum(done.values()) - 5)
        assert names(run) == sorted("atomic nap napped worked bad instead each-0 each-1 each-2".split())
    # A plain step has one boundary between its work and its checkpoint; no other repeats anything.
    assert sorted(repeated) == [0] * (boundaries - 5) + [1] * 5


@in_threads
def test_a_worker_may_die_anywhere_in_its_threads(jobs, rows, ledger):
    @job("fork", backoff=SOON)
    def fork(ctx):
        def branch(n):
            first = ctx.step.run("plain", ledger.note, (ctx.run_id, n), n)
            ctx.step.atomic("atomic", rows.add, f"{n} {ctx.run_id}")
            if n == 1:
                ctx.step.sleep("nap", DAY)
            return first

        return ctx.step.parallel(*[lambda n=n: branch(n) for n in range(3)])

    boundaries = 0
    for run in jobs.crash_everywhere(fork):
        boundaries += 1
        assert (run.status, run.output) == (RunStatus.COMPLETED, [0, 1, 2]), run.error
        assert sorted(name for name in rows.names() if str(run.pk) in name) == [
            f"{n} {run.pk}" for n in range(3)
        ]
        # Each that was at work when the worker died may be repeated, once.
        assert all(1 <= times <= 2 for times in Counter(ledger).values())
    assert boundaries > 12


# Threads.


class Crowd:
    """Count who is inside, and have nobody leave before ``full`` have been in."""

    def __init__(self, full):
        self.full, self.inside, self.most, self.been = full, 0, 0, 0
        self.moved = threading.Condition()

    def visit(self):
        with self.moved:
            self.inside, self.been = self.inside + 1, self.been + 1
            self.most = max(self.most, self.inside)
            self.moved.notify_all()
            assert self.moved.wait_for(lambda: self.most >= self.full or self.been >= 12, 10)
            self.inside -= 1


@in_threads
@pytest.mark.parametrize("tool", ["parallel", "map"])
@pytest.mark.parametrize(
    ("limit", "expected"), [({}, 8), ({"limit": 3}, 3), ({"limit": 1}, 1), ({"limit": 50}, 12)]
)
def test_the_limit_is_reached_and_not_exceeded(tool, limit, expected, jobs):
    crowd = Crowd(expected)

    @job("fork")
    def fork(ctx):
        if tool == "map":
            return ctx.step.map("s", lambda n: crowd.visit() or n, range(12), **limit)
        thunks = [lambda n=n: ctx.step.run("s", lambda: crowd.visit() or n) for n in range(12)]
        return ctx.step.parallel(*thunks, **limit)

    run = jobs.run(fork)

    assert run.output == list(range(12)), run.error
    assert crowd.most == expected


@in_threads
def test_branches_know_whose_they_are(jobs, caplog):
    mine = contextvars.ContextVar("mine", default=None)

    @job("fork")
    def fork(ctx):
        mine.set("the job's")

        def branch(n):
            mine.set(f"{mine.get()} {n}")
            ctx.logger.warning("branch %s", n)
            ctx.step.run("step", lambda: ctx.logger.warning("step %s", n))
            return mine.get()

        return ctx.step.parallel(*[lambda n=n: branch(n) for n in range(3)]), mine.get()

    run = jobs.run(fork)

    assert run.output == (["the job's 0", "the job's 1", "the job's 2"], "the job's")
    said = [record for record in caplog.records if record.name == "django_jobs.job.fork"]
    assert {record.run_id for record in said} == {str(run.pk)}
    assert sorted(record.getMessage() for record in said) == sorted(
        f"{what} {n}" for what in ("branch", "step") for n in range(3)
    )


def test_a_branch_says_what_it_has_to_say_once(jobs, either_way, caplog):
    @job("fork", backoff=SOON)
    def fork(ctx):
        def branch(n, *naps):
            ctx.logger.warning("begin %s", n)
            for number, days in enumerate(naps):
                ctx.step.sleep("nap", days * DAY)
                ctx.logger.warning("nap %s of %s", number, n)
            ctx.step.run("step", lambda: ctx.logger.warning("step of %s", n))
            ctx.logger.warning("end %s", n)

        ctx.logger.warning("begin")
        ctx.step.run("first", int)
        ctx.logger.warning("fork")
        ctx.step.parallel(lambda: branch(0), lambda: branch(1, 1, 1), lambda: branch(2, 3))
        ctx.logger.warning("joined")
        ctx.step.sleep("night", DAY)
        ctx.logger.warning("end")

    run = jobs.run(fork)
    jobs.advance(10 * DAY)

    assert fresh(run).status == RunStatus.COMPLETED
    said = Counter(r.getMessage() for r in caplog.records if r.name == "django_jobs.job.fork")
    assert set(said.values()) == {1}, said
    assert len(said) == 4 + 3 * 3 + 3


def test_a_branch_whose_code_is_tried_again_speaks_again(jobs, either_way, caplog):
    tries = []

    @job("fork", backoff=SOON)
    def fork(ctx):
        def stumbles():
            ctx.step.run("step", int)
            ctx.logger.warning("try %s", len(tries))
            tries.append(1)
            if len(tries) == 1:
                raise ConnectionError

        ctx.step.parallel(stumbles, lambda: None)

    jobs.run(fork)
    jobs.advance(SOON[0])

    said = [r.getMessage() for r in caplog.records if r.name == "django_jobs.job.fork"]
    assert said == ["try 0", "try 1"]


@in_threads
def test_a_step_in_a_branch_is_the_same_one_statement(jobs):
    made = []

    @job("fork")
    def fork(ctx):
        def branch(n):
            ctx.step.run("connect", connection.ensure_connection)
            with CaptureQueriesContext(connection) as captured:
                ctx.step.run("one", int)
            made.append([query["sql"].split()[0] for query in captured])

        ctx.step.parallel(*[lambda n=n: branch(n) for n in range(4)])
        ctx.step.map("each", str, [1, 2])

    run = jobs.run(fork)

    assert run.status == RunStatus.COMPLETED, run.error
    assert made == [["INSERT"]] * 4


@in_threads
@pytest.mark.only_on("sqlite")
def test_beside_a_database_in_memory_there_are_no_threads(jobs, worked, ledger, monkeypatch):
    """What one connection holds there, another does not wait for: it is refused."""

    @job("fork")
    def fork(ctx):
        return ctx.step.parallel(*[lambda n=n: ctx.step.run("s", worked, n, n) for n in range(3)])

    connection.ensure_connection()  # To what has the tables; only its name is another from here on.
    monkeypatch.setitem(connection.settings_dict, "NAME", "file:memorydb_default?mode=memory&cache=shared")
    run = jobs.run(fork)
    monkeypatch.undo()

    assert run.output == [0, 1, 2]
    assert ledger.threads == {threading.get_ident()}


@in_threads
@pytest.mark.only_on("postgresql")
def test_no_connection_and_no_thread_of_a_branch_is_left(jobs):
    @job("fork")
    def fork(ctx):
        return ctx.step.parallel(*[lambda: ctx.step.run("s", connections_there)] * 6, limit=6)

    def connections_there():
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            return cursor.fetchone()[0]

    threads, before = threading.active_count(), connections_there()
    for _ in range(10):
        run = jobs.run(fork)
        assert run.status == RunStatus.COMPLETED
    assert threading.active_count() == threads
    # The server needs a moment to see that one was closed.
    pause = threading.Event()
    assert any(connections_there() <= before or pause.wait(0.05) for _ in range(100))


@in_threads
def test_if_there_can_be_no_more_threads_those_there_are_do_the_work(jobs, monkeypatch, ledger):
    begun = []

    class Scarce(threading.Thread):
        def start(self):
            if len(begun) == 2:
                raise RuntimeError("can't start new thread")
            begun.append(self)
            super().start()

    @job("fork", backoff=SOON)
    def fork(ctx):
        return ctx.step.parallel(*[lambda n=n: ctx.step.run("s", ledger.note, n, n) for n in range(5)])

    with monkeypatch.context() as scarcity:
        scarcity.setattr(branches.threading, "Thread", Scarce)
        run = jobs.run(fork)
    assert (run.status, sorted(ledger)) == (RunStatus.QUEUED, [0, 1, 2, 3, 4])
    jobs.advance(SOON[0])

    assert fresh(run).output == [0, 1, 2, 3, 4]
    assert len(ledger) == 5


@pytest.mark.parametrize("tool", ["parallel", "map"])
def test_a_run_has_no_more_steps_than_it_may_however_many_work_at_once(tool, jobs, either_way, ledger):
    @job("fork", retries=0)
    def fork(ctx):
        ctx.step.run("first", int)
        if tool == "map":
            return ctx.step.map("s", ledger.note, range(10))
        return ctx.step.parallel(*[lambda n=n: ctx.step.run("s", ledger.note, n) for n in range(10)])

    with override_settings(DJANGO_JOBS={"MAX_STEPS": 5}):
        run = jobs.run(fork)

    assert (run.status, "the most it may have (MAX_STEPS)" in run.error["message"]) == (
        RunStatus.FAILED,
        True,
    )
    assert Step.objects.filter(status="completed").count() <= 5
    assert len(ledger) <= 4


def test_on_failure_may_fork_too(jobs, either_way, ledger):
    def undo(ctx, error):
        ctx.step.parallel(*[lambda n=n: ctx.step.run("s", ledger.note, n) for n in range(3)])

    @job("fork", retries=0, on_failure=undo)
    def fork(ctx):
        ctx.step.parallel(lambda: ctx.step.run("s", lambda: 1 / 0), lambda: ctx.step.run("s", int))

    run = jobs.run(fork)

    assert run.status == RunStatus.FAILED
    assert sorted(ledger) == [0, 1, 2]
    assert names(run) == ["s", "s#2", "s#3", "s#4", "s#5"]


def test_an_event_is_given_to_one_branch_only(jobs, either_way):
    @job("fork", on("a/begun"))
    def fork(ctx):
        def waiter():
            return ctx.step.wait_for_event("hear", "a/b", timeout=DAY).data["n"]

        return ctx.step.parallel(*[waiter] * 3)

    emit("a/begun")
    jobs.drain()
    for n in (1, 2, 3):
        emit("a/b", {"n": n})
    jobs.drain()

    assert sorted(Run.objects.get().output) == [1, 2, 3]


def test_a_non_retriable_error_of_a_branch_fails_the_run_at_once(jobs, either_way):
    def refuse():
        raise NonRetriableError("no use")

    run = jobs.run(job("fork")(lambda ctx: ctx.step.parallel(refuse, lambda: ctx.step.run("s", int))))
    assert (run.status, run.error["message"]) == (RunStatus.FAILED, "no use")
    assert names(run) == ["s"]

"""At most so many at once: whose turn it is, who waits, and what is left when someone dies."""

import random
from dataclasses import replace
from datetime import timedelta
from threading import Lock

import pytest

from django_jobs import Concurrency, InvalidJob, NonRetriableError, admission, clock, job, registry, services
from django_jobs.conf import conf
from django_jobs.executor import execute
from django_jobs.models import OPEN, Lane, Run, RunStatus, Seat

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def statuses(*runs):
    return [Run.objects.get(pk=run.pk).status for run in runs]


def claim(limit=1):
    return Run.objects.claim(limit, jobs=["limited"], worker="test")


def naps(limit=1, key=None, scope="run", **policy):
    """A job that sleeps an hour in its middle, limited."""

    @job("limited", concurrency=Concurrency(limit, key, scope), **policy)
    def limited(ctx):
        ctx.step.run("first", int)
        ctx.step.sleep("nap", HOUR)
        return ctx.step.run("last", int)

    return limited


# A whole run.


def test_a_sleeping_run_keeps_its_place_and_the_next_one_starts_when_it_ends(jobs):
    limited = naps()
    first = jobs.run(limited)
    second = jobs.run(limited)
    assert statuses(first, second) == [RunStatus.SLEEPING, RunStatus.QUEUED]
    assert Run.objects.get(pk=second.pk).reason == "Concurrency: waits for the only place."

    jobs.advance(HOUR)

    assert statuses(first, second) == [RunStatus.COMPLETED, RunStatus.SLEEPING]
    assert Run.objects.get(pk=second.pk).started_at == jobs._now, "it was woken at once"
    jobs.advance(HOUR)
    assert statuses(second) == [RunStatus.COMPLETED]


def test_waiting_leaves_no_trace_of_a_pass_a_start_or_a_crash(jobs):
    limited = naps()
    jobs.run(limited)
    second = jobs.run(limited)
    jobs.advance(HOUR / 2)

    waiting = Run.objects.get(pk=second.pk)

    assert (waiting.passes, waiting.started_at, waiting.crashes, waiting.attempt) == (0, None, 0, 0)
    assert (waiting.lease, waiting.claimed_by != "") == (None, True)
    jobs.advance(2 * HOUR)
    waiting.refresh_from_db()
    assert (waiting.status, waiting.passes, waiting.reason) == (RunStatus.COMPLETED, 2, "")


def test_as_many_as_the_limit_are_at_work_and_never_more(jobs):
    limited = naps(3)
    runs = [limited.start() for _ in range(10)]
    at_once = []
    for _ in range(5):
        jobs.drain()
        at_once.append(Run.objects.filter(status=RunStatus.SLEEPING).count())
        jobs.advance(HOUR)

    assert at_once == [3, 3, 3, 1, 0]
    assert set(statuses(*runs)) == {RunStatus.COMPLETED}


def test_each_key_has_places_of_its_own(jobs):
    limited = naps(1, "tenant")
    a1, a2, b1 = (jobs.run(limited, {"tenant": tenant}) for tenant in ["a", "a", "b"])

    assert statuses(a1, a2, b1) == [RunStatus.SLEEPING, RunStatus.QUEUED, RunStatus.SLEEPING]
    assert Run.objects.get(pk=a2.pk).reason == 'Concurrency: waits for the only place for tenant="a".'


def test_a_key_may_be_a_function_of_the_event_and_a_path_that_leads_nowhere_is_one_key(jobs):
    limited = naps(1, lambda event: event.data["order"]["customer"])
    one, other, same = (jobs.run(limited, {"order": {"customer": n}}) for n in [7, "7", 7])
    assert statuses(one, other, same) == [RunStatus.SLEEPING, RunStatus.SLEEPING, RunStatus.QUEUED]

    Run.objects.all().delete()
    limited = naps(1, "order.customer")
    nowhere = [jobs.run(limited, data) for data in [{}, {"order": 5}, {"order": {"customer": None}}]]
    assert statuses(*nowhere) == [RunStatus.SLEEPING, RunStatus.QUEUED, RunStatus.QUEUED]


def test_a_key_that_raises_skips_the_run_and_says_why(jobs):
    limited = naps(1, lambda event: event.data["tenant"])

    run = jobs.run(limited, {})

    assert (run.status, run.reason) == (
        RunStatus.SKIPPED,
        "KeyError in a key of its flow control: 'tenant'",
    )
    assert jobs.run(limited, {"tenant": 1}).status == RunStatus.SLEEPING


def test_a_key_that_is_not_json_skips_the_run_and_says_why(jobs):
    run = jobs.run(naps(1, lambda event: object()))

    assert run.status == RunStatus.SKIPPED
    assert run.reason.startswith("TypeError in a key of its flow control: the key of concurrency")


@pytest.mark.parametrize("ending", ["complete", "fail", "cancel"])
def test_however_a_run_ends_its_place_is_free(ending, jobs):
    @job("limited", concurrency=Concurrency(1), retries=0)
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)
        if ctx.event.data.get("fails"):
            raise NonRetriableError("no")

    first = jobs.run(limited, {"fails": ending == "fail"})
    second = jobs.run(limited)
    if ending == "cancel":
        services.cancel(first)
        jobs.drain()
    else:
        jobs.advance(HOUR)

    assert statuses(second) == [RunStatus.SLEEPING]


def test_a_run_that_waits_for_its_next_attempt_keeps_its_place(jobs):
    @job("limited", concurrency=Concurrency(1), retries=1, backoff=[HOUR])
    def limited(ctx):
        if ctx.attempt == 0:
            raise ValueError("once")

    first, second = jobs.run(limited), jobs.run(limited)

    assert statuses(first, second) == [RunStatus.QUEUED, RunStatus.QUEUED]
    assert second.reason
    assert not first.reason
    jobs.advance(HOUR)
    assert statuses(first) == [RunStatus.COMPLETED]


def test_a_deleted_run_holds_no_place(jobs):
    limited = naps()
    first, second = jobs.run(limited), jobs.run(limited)
    Run.objects.filter(pk=first.pk).delete()

    jobs.advance(2 * SECOND)

    assert statuses(second) == [RunStatus.SLEEPING]


def test_a_failed_run_that_is_retried_asks_for_a_place_again(jobs):
    @job("limited", concurrency=Concurrency(1), retries=0)
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)
        ctx.step.run("work", int, ctx.event.data["text"])

    first = jobs.run(limited, {"text": "x"})
    jobs.advance(HOUR)
    second = jobs.run(limited, {"text": "1"})
    services.retry(first)
    jobs.drain()
    assert statuses(first, second) == [RunStatus.QUEUED, RunStatus.SLEEPING]

    jobs.advance(HOUR)

    assert statuses(first, second) == [RunStatus.FAILED, RunStatus.COMPLETED]


def test_a_failed_run_that_is_retried_before_anyone_came_goes_on_in_its_place(jobs):
    @job("limited", concurrency=Concurrency(1), retries=0)
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)
        if not ctx.step.run("again", lambda: Run.objects.filter(reason="again").exists()):
            raise NonRetriableError("no")

    first = jobs.run(limited)
    jobs.advance(HOUR)
    assert statuses(first) == [RunStatus.FAILED]
    services.retry(first)
    second = limited.start()
    jobs.drain()

    assert statuses(first) == [RunStatus.FAILED]
    assert statuses(second) == [RunStatus.SLEEPING]
    assert Seat.objects.count() == 1


# The line.


def test_the_line_goes_by_priority_and_then_by_who_came_first(jobs, ledger):
    @job("limited", concurrency=Concurrency(1), priority=lambda event: event.data["priority"])
    def limited(ctx):
        ctx.step.run("note", ledger.note, ctx.event.data["name"])
        ctx.step.sleep("nap", HOUR)

    jobs.run(limited, {"name": "holder", "priority": 0})
    for name, priority in [("b", 0), ("low", -5), ("c", 0), ("high", 5), ("d", 0)]:
        jobs.run(limited, {"name": name, "priority": priority})
        jobs._now += SECOND

    jobs.advance(7 * HOUR)

    assert ledger == ["holder", "high", "b", "c", "d", "low"]


def test_one_that_comes_just_when_a_place_is_free_does_not_pass_those_in_the_line(jobs, ledger):
    @job("limited", concurrency=Concurrency(1))
    def limited(ctx):
        ctx.step.run("note", ledger.note, ctx.event.data["name"])
        ctx.step.sleep("nap", HOUR)

    holder = jobs.run(limited, {"name": "holder"})
    jobs.run(limited, {"name": "waits"})
    jobs._now += SECOND / 2
    Run.objects.filter(pk=holder.pk).cancel()  # Nobody has told the line.
    jobs.run(limited, {"name": "fresh"})

    assert ledger == ["holder", "waits"]


def test_only_as_many_are_woken_as_there_are_places_and_the_rest_sleeps_on(jobs):
    limited = naps(2)
    for _ in range(12):
        limited.start()
    jobs.drain()
    first = Run.objects.filter(status=RunStatus.SLEEPING).first()

    services.cancel(first)

    assert jobs.drain() == 1
    assert Run.objects.filter(status=RunStatus.SLEEPING).count() == 2


def test_a_full_lane_is_in_nobodys_way(jobs):
    """Those in line are not looked at again: what another key brings is the next thing a worker claims."""
    limited = naps(1, "tenant")
    for _ in range(50):
        limited.start({"tenant": "large"})
    jobs.drain()
    small = limited.start({"tenant": "small"})

    [claimed] = claim(10)

    assert claimed.pk == small.pk


def test_a_backlog_that_no_worker_has_looked_at_yet_is_put_into_the_line_all_together(jobs):
    """A run of another key that comes behind 150 of one key waits for a handful of looks, not for 150."""
    limited = naps(1, "tenant")
    for _ in range(150):
        limited.start({"tenant": "large"})
    jobs._now += SECOND
    small = limited.start({"tenant": "small"})

    looks = 0
    while Run.objects.get(pk=small.pk).status != RunStatus.SLEEPING:
        looks += 1
        for run in claim(1):
            execute(run)

    assert looks < 20
    jobs.advance(200 * HOUR)
    assert set(Run.objects.values_list("status", "passes", "reason")) == {("completed", 2, "")}


def test_those_in_line_go_on_under_another_key_when_the_code_changes(jobs):
    limited = naps(1)
    for _ in range(3):
        limited.start({"tenant": "a"})
    jobs.drain()
    registry.register(replace(limited, concurrency=(Concurrency(3, "tenant"),)))

    jobs.advance(2 * SECOND)

    assert set(Run.objects.values_list("status", flat=True)) == {RunStatus.SLEEPING}


def test_a_cluster_lets_runs_go_whose_job_has_no_limit_any_more(jobs):
    limited = naps(1)
    for _ in range(3):
        limited.start()
    jobs.drain()
    registry.register(replace(limited, concurrency=()))

    admission.unblock()
    jobs.drain()

    assert set(Run.objects.values_list("status", "reason")) == {("sleeping", "")}


def test_word_that_got_lost_costs_a_second_or_a_tenth_of_the_wait(jobs):
    limited = naps()
    first, second = jobs.run(limited), jobs.run(limited)
    Run.objects.filter(pk=first.pk).cancel()  # By a process that died before it could say so.

    jobs.advance(SECOND)

    assert statuses(second) == [RunStatus.SLEEPING]


def test_the_cluster_says_for_a_dead_worker_that_its_settled_runs_have_left(jobs):
    limited = naps()
    first, second = jobs.run(limited), jobs.run(limited)
    Run.objects.filter(pk=first.pk).cancel()

    admission.bereave([first.pk])
    jobs.drain()

    assert statuses(second) == [RunStatus.SLEEPING]


def test_a_line_goes_on_when_its_first_is_cancelled_without_a_word(jobs):
    limited = naps()
    runs = [jobs.run(limited) for _ in range(4)]
    Run.objects.filter(pk=runs[1].pk).cancel()

    jobs.advance(3 * HOUR)

    assert statuses(*runs) == ["completed", "cancelled", "completed", "completed"]


def test_two_weeks_in_line_are_a_few_looks(jobs):
    @job("limited", concurrency=Concurrency(1))
    def limited(ctx):
        ctx.step.sleep("nap", timedelta(days=14))

    for _ in range(5):
        limited.start()
    jobs.drain()
    passes = []
    jobs.drain, drain = lambda: passes.append(drain()), jobs.drain

    jobs.advance(timedelta(days=13))

    assert sum(passes) < 500


def test_several_limits_hold_together_and_a_run_takes_all_of_its_places_or_none(jobs):
    limits = [Concurrency(1, "tenant"), Concurrency(2)]

    @job("limited", concurrency=limits)
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)

    a1, a2, b, c = (jobs.run(limited, {"tenant": tenant}) for tenant in ["a", "a", "b", "c"])

    assert statuses(a1, a2, b, c) == ["sleeping", "queued", "sleeping", "queued"]
    assert Seat.objects.count() == 4, "one that waits holds none"
    assert a2.reason == 'Concurrency: waits for the only place for tenant="a".'
    assert c.reason == "Concurrency: waits for one of 2 places."
    jobs.advance(HOUR)
    assert statuses(a1, a2, b, c) == ["completed", "sleeping", "completed", "sleeping"]


def test_a_run_that_waits_for_one_place_gives_up_the_other_it_had(jobs):
    @job("limited", concurrency=[Concurrency(1, "a"), Concurrency(1, "b")], retries=0)
    def limited(ctx):
        ctx.step.sleep("nap", HOUR)
        ctx.step.run("work", int, ctx.event.data["text"])

    failed = jobs.run(limited, {"a": 1, "b": 1, "text": "x"})
    jobs.advance(HOUR)
    jobs.run(limited, {"a": 2, "b": 1, "text": "1"})
    services.retry(failed)
    jobs.drain()
    third = jobs.run(limited, {"a": 1, "b": 2, "text": "1"})

    assert statuses(failed, third) == [RunStatus.QUEUED, RunStatus.SLEEPING]
    jobs.advance(2 * HOUR)
    assert statuses(failed, third) == [RunStatus.FAILED, RunStatus.COMPLETED]


def test_a_lower_limit_takes_effect_as_places_become_free(jobs):
    limited = naps(3)
    [limited.start() for _ in range(6)]
    jobs.drain()
    naps(1)

    jobs.advance(HOUR)

    assert Run.objects.filter(status=RunStatus.SLEEPING).count() == 1


def test_runs_go_on_when_the_limit_is_gone(jobs):
    limited = naps()
    [limited.start() for _ in range(3)]
    jobs.drain()
    registry.register(replace(limited, concurrency=()))

    jobs.advance(3 * HOUR)

    assert set(Run.objects.values_list("status", flat=True)) == {"completed"}


# A step.


def test_with_scope_step_a_sleeping_run_makes_room(jobs):
    limited = naps(scope="step")

    runs = [jobs.run(limited) for _ in range(3)]

    assert statuses(*runs) == [RunStatus.SLEEPING] * 3


def test_with_scope_step_only_so_many_are_in_the_hands_of_workers(jobs):
    inside = []

    @job("limited", concurrency=Concurrency(1, scope="step"))
    def limited(ctx):
        if ctx.run_id == first.pk:
            execute(second)
            inside.append(statuses(first, second))

    [limited.start() for _ in range(3)]
    first, second, third = claim(3)
    execute(first)
    assert inside == [["running", "queued"]]
    execute(third)
    jobs.drain()
    assert statuses(first, second, third) == ["completed"] * 3


def test_with_scope_step_a_lease_that_was_taken_over_holds_no_place(jobs):
    limited = naps(scope="step")
    limited.start()
    [first] = claim()
    jobs._now += timedelta(seconds=conf.LEASE_SECONDS)
    [second] = claim()
    execute(second)
    assert statuses(second) == [RunStatus.SLEEPING]
    execute(first)
    assert statuses(second) == [RunStatus.SLEEPING]


# Crashes.


@pytest.mark.parametrize("scope", ["run", "step"])
def test_a_worker_may_die_anywhere_and_no_place_is_lost(scope, jobs):
    limited = naps(2, scope=scope)
    deaths = 0
    for run in jobs.crash_everywhere(limited):
        deaths += 1
        assert run.status == RunStatus.COMPLETED
        others = [jobs.run(limited) for _ in range(2)]
        assert statuses(*others) == [RunStatus.SLEEPING] * 2, "both places are there"
        jobs.advance(HOUR)
        assert statuses(*others) == [RunStatus.COMPLETED] * 2
    assert deaths > 10


@pytest.mark.parametrize("scope", ["run", "step"])
def test_the_worker_of_a_run_in_the_line_may_die_anywhere(scope, jobs):
    """A holder, and behind it one whose worker dies: the line goes on."""

    @job("limited", concurrency=Concurrency(1, scope=scope))
    def limited(ctx):
        ctx.step.sleep("nap", 2 * SECOND)

    def with_others():
        limited.start()
        limited.start()
        return {}

    for run in jobs.crash_everywhere(limited, with_others):
        assert run.status == RunStatus.COMPLETED
        assert not Run.objects.filter(status__in=OPEN).exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("scope", ["run", "step"])
def test_workers_that_race_never_exceed_the_limit(scope, at_once, monkeypatch):
    """Four workers, some of whom abandon what they have; the count of those inside is kept beside the database."""
    lock, inside, most = Lock(), set(), []
    dice = random.Random(7)

    @job("limited", concurrency=Concurrency(2, "tenant", scope))
    def limited(ctx):
        tenant = ctx.event.data["tenant"]
        with lock:
            inside.add((tenant, ctx.run_id))
            most.append(sum(one == tenant for one, _ in inside))
        ctx.step.run("work", int)
        with lock:
            inside.discard((tenant, ctx.run_id))

    for number in range(40):
        limited.start({"tenant": number % 2})

    def work():
        for _ in range(400):
            runs = claim(2)
            for run in runs:
                if dice.random() < 0.1:
                    Run.objects.abandon([run.hold])
                else:
                    execute(run)
            if not runs:
                Run.objects.filter(status=RunStatus.QUEUED).wake(clock.now())
                if not Run.objects.filter(status__in=OPEN).exists():
                    return

    monkeypatch.setattr(conf, "MAX_CRASHES", 1000, raising=False)
    at_once(work)

    assert max(most) <= 2
    assert set(Run.objects.values_list("status", flat=True)) == {"completed"}


@pytest.mark.django_db(transaction=True)
def test_one_place_wanted_by_many_at_once_goes_to_one(at_once):
    limited = naps()
    for round in range(5):
        for _ in range(4):
            limited.start()

        def one():
            for run in claim(1):
                execute(run)

        at_once(one)
        assert Run.objects.filter(status=RunStatus.SLEEPING).count() == 1, round
        assert not Seat.objects.exclude(number=1).exists()
        Run.objects.filter(status__in=OPEN).cancel()


# Lanes.


def test_lanes_that_nothing_needs_are_pruned_and_the_others_stay(jobs):
    limited = naps(1, "tenant")
    jobs.run(limited, {"tenant": "done"})
    jobs.advance(timedelta(days=3))
    jobs.run(limited, {"tenant": "at work"})
    Lane.objects.update(used_at=jobs._now - timedelta(days=2))

    assert Lane.objects.prune() == 1
    assert [lane.name for lane in Lane.objects.all()] == ['limited: concurrency for tenant="at work"']
    assert Seat.objects.count() == 1


# What cannot be.


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, "3"])
def test_a_limit_that_is_no_number_of_places_is_refused(limit):
    with pytest.raises(InvalidJob, match="limit is a whole number"):
        Concurrency(limit)


@pytest.mark.parametrize("key", ["", "a..b", ".a", 7, ["a"]])
def test_a_key_that_is_no_path_and_no_function_is_refused(key):
    with pytest.raises(InvalidJob, match="key is a dotted path"):
        Concurrency(1, key)


def test_another_scope_is_refused():
    with pytest.raises(InvalidJob, match='scope is "run" or "step"'):
        Concurrency(1, scope="account")


@pytest.mark.parametrize("concurrency", [3, [3], "a", [Concurrency(1), None]])
def test_what_is_not_a_concurrency_is_refused(concurrency):
    with pytest.raises(InvalidJob, match='Job "limited": concurrency is a Concurrency'):
        job("limited", concurrency=concurrency)(lambda ctx: None)


def test_two_limits_for_the_same_key_and_scope_are_refused():
    with pytest.raises(InvalidJob, match="two limits for the same key"):
        job("limited", concurrency=[Concurrency(1, "a"), Concurrency(2, "a")])(lambda ctx: None)

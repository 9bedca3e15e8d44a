import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_jobs.exceptions import InvalidEvent, InvalidJob
from django_jobs.triggers import candidates, check_event_name, cron, on, spread

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)

#: The last moves the clocks by half an hour, Morocco by minus one for Ramadan.
ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca"]


# Events


@pytest.mark.parametrize(
    ("pattern", "name", "matching"),
    [
        ("user/created", "user/created", True),
        ("user/created", "user/created.late", False),
        ("user/*", "user/created", True),
        ("user/*", "user/profile.changed", True),
        ("user/*", "user/a/b", True),
        ("user/*", "user/", False),
        ("user/*", "user", False),
        ("user/*", "users/created", False),
        ("user/*", "a/user/created", False),
        ("user/profile.*", "user/profile.changed", True),
        ("user/profile.*", "user/profile", False),
        ("user/profile.*", "user/profile/changed", False),
        ("Ünïcode/*", "Ünïcode/x", True),
        ("user/*", "User/created", False),
    ],
)
def test_a_trigger_matches_its_name_or_what_comes_after_its_wildcard(pattern, name, matching):
    assert on(pattern).matches(name) is matching


def test_the_candidates_of_a_name_are_all_patterns_that_match_it_longest_first():
    assert candidates("user/profile.changed") == ["user/profile.changed", "user/profile.*", "user/*"]
    assert candidates("plain") == ["plain"]
    assert candidates("user/") == ["user/"]


@given(st.text("ab/.", min_size=1, max_size=12))
def test_each_candidate_is_a_pattern_that_matches(name):
    assert all(on(pattern).matches(name) for pattern in candidates(name))
    assert len(set(candidates(name))) == len(candidates(name))


@pytest.mark.parametrize("name", ["*", "user*", "u*r/x", "user/*/x", "user/**", "*/x", "user/x*", "user/*.*"])
def test_a_wildcard_elsewhere_is_refused(name):
    with pytest.raises(InvalidJob, match=r"user/\* or user/profile"):
        on(name)


@pytest.mark.parametrize("name", ["django_jobs/run.failed", "django_jobs/*", "django_jobs/"])
def test_the_names_of_the_engine_are_reserved(name):
    with pytest.raises(InvalidJob, match="reserved for the engine"):
        on(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the name is empty"),
        ("x" * 256, "256 characters, and at most 255"),
        ("user/cre\nated", "control character"),
        ("user/\0", "control character"),
        ("user/\x85", "control character"),
        ("user/\ud800", "control character"),
        (None, "an event name is a str"),
        (b"user/created", "an event name is a str"),
    ],
)
def test_a_name_no_event_can_have_is_refused_for_triggers_and_for_events(name, said):
    with pytest.raises(InvalidJob, match=said):
        on(name)
    with pytest.raises(InvalidEvent, match=said):
        check_event_name(name)


def test_an_event_cannot_be_called_by_a_wildcard():
    with pytest.raises(InvalidEvent, match=r'Event "user/\*": \* is for triggers'):
        check_event_name("user/*")


@pytest.mark.parametrize("name", ["x", "x" * 255, "user/onboarding.completed", "Zoë/straße", "a b"])
def test_other_names_are_fine(name):
    check_event_name(name)
    assert on(name).matches(name)


def test_a_wildcard_counts_in_the_length():
    on("x" * 253 + "/*")
    with pytest.raises(InvalidJob, match="256 characters"):
        on("x" * 254 + "/*")


def is_paid(event):
    return True


async def is_paid_async(event):
    return True


@pytest.mark.parametrize("when", [is_paid_async, "is_paid", 1])
def test_when_is_a_plain_function(when):
    with pytest.raises(InvalidJob, match="when is a plain function of the event"):
        on("user/*", when)


# How triggers read


@pytest.mark.parametrize(
    ("trigger", "written"),
    [
        (on("user/*"), 'on("user/*")'),
        (on("user/*", when=is_paid), 'on("user/*", when=is_paid)'),
        (on("user/*", when=lambda event: True), 'on("user/*", when=<lambda>)'),
        (cron("0 3 * * *"), 'cron("0 3 * * *")'),
        (cron("  0  3 *\t* * "), 'cron("0 3 * * *")'),
        (cron("0 3 * * MON", tz="Europe/Berlin"), 'cron("0 3 * * MON", tz="Europe/Berlin")'),
        (cron("0 3 * * *", catch_up="all"), 'cron("0 3 * * *", catch_up="all")'),
        (cron("0 3 * * *", jitter=5 * MINUTE), 'cron("0 3 * * *", jitter=timedelta(minutes=5))'),
        (cron("0 3 * * *", jitter=1.5 * MINUTE), 'cron("0 3 * * *", jitter=timedelta(seconds=90))'),
        (
            cron("0 3 * * *", "Asia/Tokyo", "skip", 2 * DAY),
            'cron("0 3 * * *", tz="Asia/Tokyo", catch_up="skip", jitter=timedelta(days=2))',
        ),
    ],
)
def test_a_trigger_reads_as_it_was_written(trigger, written):
    assert str(trigger) == written


def test_a_callable_without_a_name_is_shown_somehow():
    assert "is_paid" in str(on("user/*", when=partial(is_paid)))


def test_triggers_are_frozen_and_equal_by_value():
    assert on("user/*") == on("user/*")
    assert len({cron("0 3 * * *"), cron("0  3 * * *"), cron("0 3 * * *", "Asia/Tokyo")}) == 2
    with pytest.raises(FrozenInstanceError):
        cron("0 3 * * *").expr = "0 4 * * *"


def test_the_key_of_a_cron_is_its_expression_and_zone_alone():
    assert cron("0 3 * * *", "Asia/Tokyo").key == "0 3 * * * Asia/Tokyo"
    assert cron("0 3 * * *").key == cron(" 0 3  * * *", catch_up="all", jitter=MINUTE).key
    assert cron("0 3 * * *").key != cron("0 3 * * *", "Asia/Tokyo").key


def test_the_key_of_a_long_expression_fits_and_stays_its_own():
    minutes = ",".join(str(minute) for minute in range(58))
    one, other = cron(f"{minutes},58 * * * *"), cron(f"{minutes},59 * * * *")
    assert len(one.key) == 150
    assert one.key != other.key
    assert one.key == cron(one.expr).key


# Crons that are refused


@pytest.mark.parametrize(
    ("expr", "said"),
    [
        ("0 3 * *", "five fields are needed, minute hour day month weekday; it has 4"),
        ("0 0 3 * * *", "it has 6"),
        ("0 0 3 * * * 2026", "it has 7"),
        ("", "it has 0"),
        ("@daily", "write the five fields out"),
        ("H 3 * * *", "H is a time of croniter's choosing"),
        ("r(0-5) 3 * * *", "croniter's choosing"),
        ("60 3 * * *", "out of range"),
        ("0 24 * * *", "out of range"),
        ("0 3 0 * *", "out of range"),
        ("x 3 * * *", "croniter cannot read it"),
        ("*/0 * * * *", "croniter cannot read it"),
        ("-5 3 * * *", "croniter cannot read it"),
        ("0 3-3 * * *", "takes 3-3 for the whole range; write 3"),
        ("0 3 * * 1,Fri-fri", "takes Fri-fri for the whole range; write Fri"),
        ("0 3 30 2 *", "never fires"),
        ("0 3 31 4,6,9,11 *", "never fires"),
        ("\N{FULLWIDTH DIGIT ZERO} 3 * * *", "only ASCII"),
        (None, "a str of five fields"),
        (5, "a str of five fields"),
    ],
)
def test_a_bad_expression_is_refused_with_what_is_wrong(expr, said):
    with pytest.raises(InvalidJob, match=said) as caught:
        cron(expr)
    assert str(expr) in str(caught.value)


@pytest.mark.parametrize(
    "tz", ["", "Europe", "../etc/passwd", "/etc/passwd", "Mars/Base", "\0", None, 5, ["UTC"]]
)
def test_a_bad_zone_is_refused(tz):
    with pytest.raises(InvalidJob, match="there is no time zone"):
        cron("0 3 * * *", tz)


def test_a_zone_may_be_given_as_such():
    assert cron("0 3 * * *", ZoneInfo("Europe/Berlin")) == cron("0 3 * * *", tz="Europe/Berlin")


def test_a_misspelt_zone_is_refused_with_the_nearest():
    with pytest.raises(InvalidJob, match=r"no time zone 'Europe/Berln'; 'Europe/Berlin'\?"):
        cron("0 3 * * *", "Europe/Berln")


@pytest.mark.parametrize("catch_up", ["last", None, ["all"], ""])
def test_a_bad_catch_up_is_refused(catch_up):
    with pytest.raises(InvalidJob, match="catch_up is one of skip, latest, all"):
        cron("0 3 * * *", catch_up=catch_up)


@pytest.mark.parametrize("jitter", [5, timedelta(0), -MINUTE, "5m"])
def test_a_bad_jitter_is_refused(jitter):
    with pytest.raises(InvalidJob, match="jitter is a timedelta above zero or None"):
        cron("0 3 * * *", jitter=jitter)


def test_a_naive_moment_is_refused():
    trigger, naive, aware = cron("0 3 * * *"), datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=UTC)
    for ask in (
        lambda: trigger.next(naive),
        lambda: list(trigger.slots(naive, aware)),
        lambda: list(trigger.slots(aware, naive)),
        lambda: trigger.latest(aware, naive),
    ):
        with pytest.raises(ValueError, match="naive"):
            ask()


# Crons where the clocks change, case by case


def fires(expr, start, end, tz="Europe/Berlin"):
    """List the slots as the local times a person would read, with their offset."""
    zone = ZoneInfo(tz)
    bounds = [datetime.fromisoformat(text).replace(tzinfo=zone) for text in (start, end)]
    return [slot.astimezone(zone).strftime("%d %H:%M%z") for slot in cron(expr, tz).slots(*bounds)]


def test_in_spring_a_daily_job_fires_at_the_first_instant_after_the_gap():
    assert fires("30 2 * * *", "2026-03-28T00:00", "2026-03-31T00:00") == [
        "28 02:30+0100",
        "29 03:00+0200",
        "30 02:30+0200",
    ]


def test_in_autumn_a_daily_job_fires_once_the_first_time():
    assert fires("30 2 * * *", "2026-10-24T00:00", "2026-10-27T00:00") == [
        "24 02:30+0200",
        "25 02:30+0200",
        "26 02:30+0100",
    ]


def test_in_spring_several_times_in_the_gap_are_one_slot_with_the_one_after_it():
    assert fires("0,20,40 2,3 * * *", "2026-03-29T00:00", "2026-03-29T12:00") == [
        "29 03:00+0200",
        "29 03:20+0200",
        "29 03:40+0200",
    ]


def test_in_spring_an_interval_skips_what_does_not_exist():
    assert fires("*/30 * * * *", "2026-03-29T01:00", "2026-03-29T04:00") == [
        "29 01:30+0100",
        "29 03:00+0200",
        "29 03:30+0200",
        "29 04:00+0200",
    ]
    assert fires("* 2 * * *", "2026-03-29T00:00", "2026-03-29T12:00") == []


def test_in_autumn_an_interval_goes_by_elapsed_time():
    assert fires("*/30 * * * *", "2026-10-25T01:30", "2026-10-25T03:00") == [
        "25 02:00+0200",
        "25 02:30+0200",
        "25 02:00+0100",
        "25 02:30+0100",
        "25 03:00+0100",
    ]


def test_in_autumn_a_two_hourly_job_fires_in_both_hours_called_two():
    assert fires("0 */2 * * *", "2026-10-25T00:30", "2026-10-25T05:00") == [
        "25 02:00+0200",
        "25 02:00+0100",
        "25 04:00+0100",
    ]


def test_a_half_hour_change_has_a_half_hour_gap_and_overlap():
    lord_howe = partial(fires, tz="Australia/Lord_Howe")
    assert lord_howe("15 2 * * *", "2026-10-04T00:00", "2026-10-05T00:00") == ["04 02:30+1100"]
    assert lord_howe("45 1 * * *", "2026-04-05T00:00", "2026-04-06T00:00") == ["05 01:45+1100"]
    assert lord_howe("45 * * * *", "2026-04-05T01:00", "2026-04-05T03:00") == [
        "05 01:45+1100",
        "05 01:45+1030",
        "05 02:45+1030",
    ]


def test_a_day_that_a_country_left_out_fires_when_the_next_begins():
    assert fires("0 10 * * *", "2011-12-29T00:00", "2012-01-01T00:00", tz="Pacific/Apia") == [
        "29 10:00-1000",
        "31 00:00+1400",
        "31 10:00+1400",
    ]


@pytest.mark.parametrize(
    ("after", "slot"),
    [
        ("2026-10-25T00:29:59.999999+00:00", "2026-10-25T00:30:00+00:00"),
        ("2026-10-25T00:30:00+00:00", "2026-10-26T01:30:00+00:00"),
        ("2026-10-25T01:15:00+00:00", "2026-10-26T01:30:00+00:00"),
        ("2026-10-25T03:45:00+02:00", "2026-10-26T01:30:00+00:00"),
        ("2026-03-29T00:59:59+00:00", "2026-03-29T01:00:00+00:00"),
        ("2026-03-29T01:00:00+00:00", "2026-03-30T00:30:00+00:00"),
    ],
)
def test_next_is_in_utc_and_strictly_after_whatever_second_or_zone_it_is_asked_from(after, slot):
    found = cron("30 2 * * *", "Europe/Berlin").next(datetime.fromisoformat(after))
    assert found.isoformat() == slot


# Crons against a brute-force reading of the rule


@cache
def changes(tz):
    """List the instants in 2026 at which the clocks of ``tz`` change."""
    zone, hour = ZoneInfo(tz), timedelta(hours=1)
    hours = [datetime(2026, 1, 1, tzinfo=UTC) + count * hour for count in range(365 * 24)]
    return [at for at in hours if at.astimezone(zone).utcoffset() != (at - hour).astimezone(zone).utcoffset()]


CHANGES = [(tz, number) for tz in ZONES for number in (0, 1)]


@cache
def timeline(tz, number, days):
    """List the minutes around a change of the clocks, each with what the clock on the wall shows."""
    change, zone = changes(tz)[number], ZoneInfo(tz)
    start = change - days * DAY
    minutes = [start + count * MINUTE for count in range(2 * days * 24 * 60)]
    return [(minute, minute.astimezone(zone).replace(tzinfo=None)) for minute in minutes]


def expected(expr, times):
    """Return the slots of ``expr`` on a timeline by looking at each minute, on the wall and elapsed."""
    minute, hour, *_ = expr.split()
    if "*" in minute or "*" in hour:
        return [instant for instant, wall in times if is_named(expr, wall)]
    first = {}
    for instant, wall in times:
        first.setdefault(wall, instant)
    for (_, before), (instant, after) in pairwise(times):
        for count in range(1, (after - before) // MINUTE):
            first[before + count * MINUTE] = instant
    return sorted({instant for wall, instant in first.items() if is_named(expr, wall)})


def is_named(expr, wall):
    minute, hour, day, month, weekday = expr.split()
    if not (names(minute, wall.minute, 59) and names(hour, wall.hour, 23) and names(month, wall.month, 12)):
        return False
    days = names(day, wall.day, 31), names(weekday, wall.isoweekday() % 7, 6)
    return any(days) if "*" not in (day, weekday) else all(days)


@cache
def names(field, value, top):
    for part in field.split(","):
        span, _, step = part.partition("/")
        low, _, high = ("0", "-", str(top)) if span == "*" else span.partition("-")
        if int(low) <= value <= int(high or low) and (value - int(low)) % int(step or 1) == 0:
            return True
    return False


def spans(low, high):
    return st.lists(st.integers(low, high), min_size=2, max_size=2, unique=True).map(sorted)


def fields(low, high):
    """Fields that restrict: ``7``, ``1,2,30``, ``5-9``, ``0-30/7``."""
    ranges = spans(low, high).map(lambda ends: f"{ends[0]}-{ends[1]}")
    return (
        st.lists(st.integers(low, high), min_size=1, max_size=3, unique=True).map(
            lambda values: ",".join(map(str, values))
        )
        | ranges
        | st.tuples(ranges, st.integers(1, 20)).map(lambda parts: f"{parts[0]}/{parts[1]}")
    )


minutes, hours = fields(0, 59), fields(0, 4) | fields(0, 23)
stars = st.just("*") | st.integers(1, 40).map(lambda step: f"*/{step}")
days = st.tuples(st.just("*") | fields(1, 31), st.just("*"), st.just("*") | fields(0, 6)).map(" ".join)
fixed = st.tuples(minutes, hours, days).map(" ".join)
intervals = (st.tuples(stars, hours, days) | st.tuples(minutes, stars, days)).map(" ".join)


def test_each_zone_changes_its_clocks_twice_a_year():
    assert [len(changes(tz)) for tz in ZONES] == [2, 2, 2, 2]


@pytest.mark.parametrize(("tz", "number"), CHANGES)
@pytest.mark.parametrize(
    "expr",
    [
        "30 2 * * *",
        "0,15,30,45 0-3 * * *",
        "10 1,2,3 * * 0",
        "*/20 * * * *",
        "45 * * * *",
        "*/15 1-3 * * 6,0",
        "5 */3 1-31/2 * *",
    ],
)
def test_the_slots_of_the_weeks_around_a_change_are_those_of_the_rule(expr, tz, number):
    times = timeline(tz, number, 7)
    slots = list(cron(expr, tz).slots(times[0][0] - MINUTE, times[-1][0]))
    assert slots == expected(expr, times)
    assert slots


@given(expr=fixed | intervals, change=st.sampled_from(CHANGES), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_expression_agrees_with_the_rule_around_any_change(expr, change, data):
    times, trigger = timeline(*change, 1), cron(expr, change[0])
    start, end = times[0][0] - MINUTE, times[-1][0]
    slots = expected(expr, times)
    assert list(trigger.slots(start, end)) == slots
    assert trigger.latest(start, end) == (slots[-1] if slots else None)

    seconds = data.draw(st.integers(0, int((end - start).total_seconds())))
    after = start + timedelta(seconds=seconds)
    later = [slot for slot in slots if slot > after]
    earlier = [slot for slot in slots if slot <= after]
    if later:
        assert trigger.next(after) == later[0]
    assert trigger.latest(start, after) == (earlier[-1] if earlier else None)


@given(
    expr=fixed | intervals,
    tz=st.sampled_from(ZONES),
    after=st.datetimes(datetime(2000, 1, 1), datetime(2060, 1, 1)),
)
@settings(max_examples=50, deadline=None)
def test_slots_increase_strictly(expr, tz, after):
    trigger, slot = cron(expr, tz), after.replace(tzinfo=UTC)
    for _ in range(5):
        slot, before = trigger.next(slot), slot
        assert slot > before
        assert slot.tzinfo is UTC


# Many slots


def test_slots_take_the_start_out_and_the_end_in():
    three = [datetime(2026, 1, day, 3, tzinfo=UTC) for day in (1, 2, 3)]
    assert list(cron("0 3 * * *").slots(three[0], three[2])) == three[1:]
    assert list(cron("0 3 * * *").slots(three[0], three[0])) == []


def test_a_limit_takes_the_oldest_slots():
    start = datetime(2026, 1, 1, tzinfo=UTC)
    assert list(cron("* * * * *").slots(start, start + 365 * DAY, limit=2)) == [
        start + MINUTE,
        start + 2 * MINUTE,
    ]


def test_the_latest_of_many_years_of_minutes_is_found_without_walking_through_them():
    start, end = datetime(1980, 1, 1, tzinfo=UTC), datetime(2026, 5, 5, 10, 3, 7, 123456, tzinfo=UTC)
    assert cron("* * * * *", "Europe/Berlin").latest(start, end) == datetime(2026, 5, 5, 10, 3, tzinfo=UTC)


def test_there_is_no_latest_where_no_slot_was():
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert cron("0 12 * * *").latest(noon, noon + DAY - MINUTE) is None
    assert cron("0 12 * * *").latest(noon, noon + DAY) == noon + DAY


def test_a_leap_day_is_found_across_a_century_without_one():
    assert cron("0 3 29 2 *").next(datetime(2096, 3, 1, tzinfo=UTC)) == datetime(2104, 2, 29, 3, tzinfo=UTC)


def test_threads_may_ask_one_trigger_at_once():
    trigger, january = cron("*/7 1,5 * * *"), datetime(2026, 1, 1, tzinfo=UTC)
    starts = [january + count * timedelta(hours=5) for count in range(3000)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(trigger.next, starts))
    finally:
        sys.setswitchinterval(interval)
    assert together == [trigger.next(start) for start in starts]


# Spread


def test_a_spread_is_the_same_for_one_seed_and_differs_between_seeds():
    assert spread(MINUTE, "a") == spread(MINUTE, "a")
    assert len({spread(MINUTE, str(seed)) for seed in range(100)}) == 100


@given(
    st.timedeltas(timedelta(microseconds=1), timedelta(days=10_000)),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_a_spread_is_below_its_jitter(jitter, seed):
    assert timedelta(0) <= spread(jitter, seed) < jitter


def test_spreads_cover_the_jitter_evenly():
    quarters = [spread(4 * MINUTE, str(seed)) // MINUTE for seed in range(1000)]
    assert all(200 < quarters.count(quarter) < 300 for quarter in range(4))


def test_no_jitter_spreads_nothing():
    assert spread(None, "a") == spread(timedelta(0), "a") == timedelta(0)

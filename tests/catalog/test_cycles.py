"""When credits fall due, by dates alone."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_jobs.catalog import cycles

DATES = st.dates(date(2000, 1, 1), date(2100, 1, 1))


@pytest.mark.parametrize(
    ("last", "interval", "expected"),
    [
        (date(2026, 1, 31), 30, date(2026, 3, 2)),
        (date(2026, 1, 1), 1, date(2026, 1, 2)),
        (date(2024, 2, 1), 30, date(2024, 3, 2)),
        (date(2026, 1, 15), "month", date(2026, 2, 15)),
        (date(2026, 12, 15), "month", date(2027, 1, 15)),
        (date(2026, 1, 31), "month", date(2026, 2, 28)),
        (date(2024, 1, 31), "month", date(2024, 2, 29)),
    ],
)
def test_the_next_cycle(last, interval, expected):
    assert cycles.following(last, interval) == expected


def test_a_month_that_is_too_short_does_not_move_the_day():
    assert cycles.due(date(2026, 1, 31), "month", date(2026, 5, 1)) == [
        date(2026, 2, 28),
        date(2026, 3, 31),
        date(2026, 4, 30),
    ]
    assert cycles.following(date(2026, 2, 28), "month", anchor_day=31) == date(2026, 3, 31)


def test_a_date_that_is_not_the_anchors_begins_an_anchor_of_its_own():
    assert cycles.following(date(2026, 2, 17), "month", anchor_day=31) == date(2026, 3, 17)


@given(DATES, st.sampled_from([1, 7, 30, 365, "month"]), st.integers(0, 2000))
def test_cycles_are_in_order_and_leave_none_out(last, interval, days):
    today = date.fromordinal(last.toordinal() + days)
    found = cycles.due(last, interval, today)

    assert found == sorted(set(found))
    assert all(last < cycle <= today for cycle in found)
    assert cycles.following(found[-1] if found else last, interval, cycles.anchor(last, None)) > today


@given(DATES, st.sampled_from([1, 7, 30, "month"]))
def test_the_coarse_filter_leaves_out_nobody_who_is_due(last, interval):
    for anchor_day in (None, last.day, 31):
        today = cycles.following(last, interval, anchor_day)
        assert last <= cycles.latest_before(today, interval)

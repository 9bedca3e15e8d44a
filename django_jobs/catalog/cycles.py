"""
When credits fall due. Dates only, never instants: a grant stamped 00:00:05 is due again at 00:00:00,
thirty days on, and the cycle does not creep.
"""

from calendar import monthrange
from datetime import date, timedelta

from .options import MONTH


def following(last: date, interval: int | str, anchor_day: int | None = None) -> date:
    """Return the cycle after ``last``: so many days later, or a calendar month."""
    if interval != MONTH:
        return last + timedelta(days=int(interval))
    year, month = (last.year + 1, 1) if last.month == 12 else (last.year, last.month + 1)
    day = anchor(last, anchor_day)
    return date(year, month, min(day, monthrange(year, month)[1]))


def anchor(last: date, anchor_day: int | None) -> int:
    """Return the day of the month to keep to: ``anchor_day`` while ``last`` is a month's version of it."""
    if anchor_day and last.day == min(anchor_day, monthrange(last.year, last.month)[1]):
        return anchor_day
    return last.day


def due(last: date, interval: int | str, today: date, anchor_day: int | None = None) -> list[date]:
    """List the cycles after ``last`` that have come by ``today``, oldest first."""
    cycles = []
    anchor_day = anchor(last, anchor_day)
    while (last := following(last, interval, anchor_day)) <= today:
        cycles.append(last)
    return cycles


def latest_before(today: date, interval: int | str) -> date:
    """Return a day that every ``last`` still due ``today`` is on or before; for a first, coarse filter."""
    return today - timedelta(days=28 if interval == MONTH else int(interval))

"""
What the runs of one key have in common, and who has a place among those at work.

Nothing here counts. A seat is taken while the run it names is open (or while its lease holds), and free once
that is not so any more; nobody has to give it back, so nobody can forget to.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connections, models
from django.db.models import Exists, OuterRef, Q
from django.utils.translation import gettext_lazy as _

from .. import clock
from .fields import NameField
from .run import OPEN, Run, RunStatus

#: A lane that nothing needs any more is kept a while, so that a late run still finds what it knows.
KEPT = timedelta(days=1)

_MEMORY = ("run_id", "since", "until", "tat", "rest")


class LaneQuerySet(models.QuerySet["Lane"]):
    def lock(self, names: dict[str, str]) -> None:
        """
        Hold these lanes (digest: name) until the end of the transaction; make those that are missing.

        One statement, and the first of its transaction: what is read after it is what others have
        committed. In the order of the digests, so that two that want the same lanes do not deadlock.
        """
        now = clock.now()
        lanes: list[Any] = [
            Lane(digest=digest, name=names[digest][:255], used_at=now) for digest in sorted(names)
        ]
        has_target = connections[self.db].features.supports_update_conflicts_with_target
        unique = ["digest"] if has_target else None
        self.bulk_create(lanes, update_conflicts=True, update_fields=["used_at"], unique_fields=unique)

    def prune(self, batch: int = 500) -> int:
        """Delete lanes, and their seats, that say nothing any more. Safe beside workers, and to repeat."""
        now = clock.now()
        at_work = Seat.objects.filter(lane=OuterRef("digest"), run__status__in=OPEN)
        waiting = Run.objects.filter(blocked_on=OuterRef("digest"))
        known = Run.objects.filter(pk=OuterRef("run_id"), status__in=OPEN)
        spent = self.filter(
            ~Exists(at_work),
            ~Exists(waiting),
            ~Exists(known),
            Q(until__isnull=True) | Q(until__lt=now),
            Q(tat__isnull=True) | Q(tat__lt=now),
            used_at__lt=now - KEPT,
        )
        deleted = 0
        while digests := list(spent.values_list("digest", flat=True)[:batch]):
            # Asked again: whoever has just locked one of them is using it.
            deleted += spent.filter(digest__in=digests)._raw_delete(self.db)
            gone = set(digests) - set(self.filter(digest__in=digests).values_list("digest", flat=True))
            Seat.objects.using(self.db).filter(lane__in=gone)._raw_delete(self.db)
        return deleted


class Lane(models.Model):
    """
    The runs of one job that have the same key of one policy.

    Whoever decides about them holds this row meanwhile. Besides it keeps what is known of the latest of them:
    the run at work, or the first, or the one collected in (``run``), since when and until when that counts; and
    for a pace the theoretical arrival time, an instant and ``rest / limit`` microseconds.
    """

    digest = models.CharField(primary_key=True, max_length=32)
    name = NameField(_("name"), max_length=255)
    used_at = models.DateTimeField(_("used at"))
    run_id = models.UUIDField(_("run"), null=True, blank=True)
    since = models.DateTimeField(_("since"), null=True, blank=True)
    until = models.DateTimeField(_("until"), null=True, blank=True)
    tat = models.DateTimeField(_("theoretical arrival time"), null=True, blank=True)
    rest = models.PositiveIntegerField(default=0)

    objects = LaneQuerySet.as_manager()
    _known: tuple[Any, ...] = ()

    class Meta:
        verbose_name = _("lane")
        verbose_name_plural = _("lanes")

    def __str__(self) -> str:
        return self.name

    def note(self) -> None:
        """Write down what has changed since the row was read; its reader holds it."""
        if self._memory != self._known:
            self.save(update_fields=_MEMORY)

    @property
    def _memory(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _MEMORY)

    @classmethod
    def from_db(cls, *row: Any, **options: Any) -> "Lane":
        lane = super().from_db(*row, **options)
        lane._known = lane._memory
        return lane


class Taken(NamedTuple):
    """A seat as it was read: its number, and by whom it was or is taken."""

    number: int
    run_id: UUID | None
    lease: UUID | None
    is_open: bool
    is_leased: bool


class SeatQuerySet(models.QuerySet["Seat"]):
    def of(self, lane: str) -> list[Taken]:
        """List the seats of a lane, those that are free again among them. Index: ``django_jobs_seat_number``."""
        rows = self.filter(lane=lane).values_list("number", "run_id", "lease", "run__status", "run__lease")
        return [
            Taken(number, run, lease, status in OPEN, status == RunStatus.RUNNING and lease == held_by)
            for number, run, lease, status, held_by in rows
        ]

    def take(self, lane: str, run: Run, number: int, before: Taken | None) -> int:
        """
        Give a seat to ``run``; return 0 if it has changed hands since it was read as ``before``.

        Compare-and-swap, so that a run that goes on (``confirm``) needs no lock.
        """
        assert run.lease is not None
        if before is None:
            self.create(lane=lane, number=number, run_id=run.pk, lease=run.lease)
            return 1
        same = self.filter(lane=lane, number=number, run=before.run_id, lease=before.lease)
        return same.update(run=run.pk, lease=run.lease)

    def confirm(self, lanes: Iterable[str], run: Run) -> int:
        """Note that ``run`` goes on in the seats it has; return in how many of these lanes it has one."""
        return self.filter(lane__in=lanes, run=run.pk).update(lease=run.lease)

    def vacate(self, lane: str, run: Run) -> int:
        """Give back a seat that ``run`` has from before and may not keep while it waits for another."""
        return self.filter(lane=lane, run=run.pk).update(run=None, lease=None)


class Seat(models.Model):
    """A place among those at work in a lane: there are as many numbers as the limit allows."""

    lane = models.CharField(max_length=32)
    number = models.PositiveIntegerField(_("number"))
    # Nullable and without a constraint: a run may be pruned and leave its seat, which is free then.
    run = models.ForeignKey(
        Run,
        models.DO_NOTHING,
        null=True,
        related_name="seats",
        db_constraint=False,
        db_index=False,
        verbose_name=_("run"),
    )
    lease = models.UUIDField(null=True)

    objects = SeatQuerySet.as_manager()

    class Meta:
        verbose_name = _("seat")
        verbose_name_plural = _("seats")
        constraints = [
            models.UniqueConstraint(fields=["lane", "number"], name="django_jobs_seat_number"),
        ]

    def __str__(self) -> str:
        return f"{self.lane} {self.number}"


def soon(run: Run, now: datetime) -> datetime:
    """
    Return when the first in a line looks for itself, in case the word that a seat is free got lost.

    After a tenth of the time it has waited, and at least a second: so the lost word costs it no more than
    that, and a line that stands for weeks behind a sleeping run costs next to nothing.
    """
    return now + min(max(timedelta(seconds=1), (now - (run.blocked_at or now)) / 10), timedelta(hours=1))


def later(run: Run, now: datetime, spread: float) -> datetime:
    """Return when another one in the line looks, in case those before it are gone: in doubled time, spread out."""
    return now + max(timedelta(minutes=10), now - (run.blocked_at or now)) * (1 + spread)


def following(runs: Iterable[Run], run: Run) -> int:
    """Return how many of ``runs`` come before ``run`` in a line."""
    return sum(turn(other) < turn(run) for other in runs)


def turn(run: Run) -> tuple[int, datetime, UUID]:
    return -run.priority, run.queued_at, run.pk

"""
The shipped ``BillingStore``: plans from the options, accounts and ledger in our tables.
"""

import logging
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from django.db import transaction
from django.db.models import F, Q

from . import cycles, ports
from .models import BillingAccount, CreditEntry
from .options import Plan, option, plans

logger = logging.getLogger("django_jobs.catalog")


class CatalogBilling:
    def due_page(self, at: datetime, *, after: str, limit: int) -> dict[str, Any]:
        """See ``BillingStore``. Keyset by primary key, so a page is the same however many were granted."""
        if not after:
            _warn_of_unknown_plans()
        accounts = BillingAccount.objects.filter(_effective(at), _maybe_due(at.astimezone(UTC).date()))
        if after:
            accounts = accounts.filter(pk__gt=after)
        page = list(accounts.order_by("pk").prefetch_related("owner")[:limit])
        return {
            "entities": [str(account.pk) for account in page if _why_not(account, at) is None],
            "next": str(page[-1].pk) if len(page) == limit else None,
        }

    def grant(self, entity: str, at: datetime) -> dict[str, Any]:
        """
        See ``BillingStore``. Row lock, then claim, balance, ledger and stamp.

        Two workers at once: the second waits for the row, reads it again and finds nothing due.
        """
        with transaction.atomic():
            account = BillingAccount.objects.select_for_update().filter(pk=entity).first()
            reason = _why_not(account, at)
            if account is None or reason:
                return {"skipped": reason}
            key = f"recurring-credits:{entity}:{at.astimezone(UTC).date().isoformat()}"
            if not ports.claim(key):
                return {"skipped": "already-granted"}
            return {"credits": _credit(account, key, at)}


def _credit(account: BillingAccount, key: str, at: datetime) -> int:
    plan = plans()[account.plan]
    stamp, cycle_count = _settled(account, plan, at)
    amount = plan.credits * (cycle_count if option("pricing.credits.catch_up") == "all" else 1)
    BillingAccount.objects.filter(pk=account.pk).update(
        credits=F("credits") + amount,
        credits_last_granted_at=stamp,
        credits_anchor_day=cycles.anchor(_date(stamp), _anchor_day(account)),
    )
    CreditEntry.objects.create(
        account=account,
        key=key,
        amount=amount,
        balance=account.credits + amount,
        reason=f"plan {account.plan}",
    )
    return amount


def _settled(account: BillingAccount, plan: Plan, at: datetime) -> tuple[datetime, int]:
    """
    Return the cycle to stamp and how many cycles came due with it.

    Missed cycles move the stamp by whole intervals, so the due dates stay where they were. Nobody's
    first grant makes up for the past: it counts as one.
    """
    last = account.credits_last_granted_at
    start = last or account.plan_started_at
    if start is None or start > at:
        return at, 1
    found = cycles.due(_date(start), plan.interval, _date(at), _anchor_day(account))
    stamp = start + (found[-1] - _date(start)) if found else start
    return stamp, len(found) if last else 1


def _why_not(account: BillingAccount | None, at: datetime) -> str | None:
    """Return why ``account`` gets nothing at ``at``, or None when it is due."""
    if account is None or account.owner is None:
        return "gone"
    if not account.is_active or not getattr(account.owner, "is_active", True):
        return "inactive"
    if account.plan_expires_at and account.plan_expires_at <= at:
        return "lapsed"
    plan = plans().get(account.plan)
    if plan is None:
        return "unknown-plan"
    if not plan.recurs:
        return "no-credits"
    if account.trial_ends_at and account.trial_ends_at > at and not plan.on_trial:
        return "on-trial"
    return None if _is_due(account, plan, _date(at)) else "not-due"


def _is_due(account: BillingAccount, plan: Plan, today: date) -> bool:
    if account.credits_last_granted_at is None:
        return True
    last = _date(account.credits_last_granted_at)
    return cycles.following(last, plan.interval, _anchor_day(account)) <= today


def _effective(at: datetime) -> Q:
    return Q(is_active=True) & (Q(plan_expires_at=None) | Q(plan_expires_at__gt=at))


def _maybe_due(today: date) -> Q:
    """Leave out whoever cannot be due: no column says for certain who is, but most are not."""
    wanted = Q(pk__in=[])
    for name, plan in plans().items():
        if plan.recurs:
            latest = cycles.latest_before(today, plan.interval)
            midnight = datetime.combine(latest + timedelta(days=1), time(), UTC)
            never_or_long_ago = Q(credits_last_granted_at=None) | Q(credits_last_granted_at__lt=midnight)
            wanted |= Q(plan=name) & never_or_long_ago
    return wanted


def _warn_of_unknown_plans() -> None:
    known = ["", *plans()]
    unknown = BillingAccount.objects.exclude(plan__in=known).order_by("plan").values_list("plan", flat=True)
    if names := list(unknown.distinct()[:20]):
        message = (
            'no credits for the plan(s) %s: DJANGO_JOBS["CATALOG"]["pricing"]["plans"] does not know them'
        )
        logger.warning(message, ", ".join(names))


def _anchor_day(account: BillingAccount) -> int | None:
    start = account.plan_started_at
    return account.credits_anchor_day or (_date(start).day if start else None)


def _date(instant: datetime) -> date:
    return instant.astimezone(UTC).date()

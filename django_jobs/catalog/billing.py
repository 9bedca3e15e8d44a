"""Stock jobs about plans and credits."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from django_jobs import NonRetriableError, StepError, cron, job

from . import ports
from .options import option

logger = logging.getLogger("django_jobs.catalog")


@job("recurring-credits", cron("0 0 * * *"), group="billing", gate="pricing.credits.enabled", retries=2)
def recurring_credits(ctx: Any) -> dict[str, Any]:
    """
    Give each billing account its plan's credits again, on the plan's interval.

    Once per account and day, whatever crashes, runs twice or is caught up after an outage: each grant
    is one transaction of claim, balance, ledger row and stamp. One account that fails stops no other.
    """
    at, after = _instant(ctx), _given(ctx).get("after", "")
    if ctx.now - at >= timedelta(days=option("webhooks.retention_days") or 36500):
        logger.warning("recurring-credits: the run of %s is too old; its claims may be gone", at.date())
        return {"date": at.date(), "skipped": "too-old"}
    counts = {"granted": 0, "credits": 0, "skipped": 0}
    failed: list[str] = []
    for number in range(option("pricing.credits.pages_per_run")):
        page = _find(ctx, number, at, after)
        for entity in page["entities"]:
            if flag := ctx.job.closed_by:
                logger.info("recurring-credits: stopped, %s was switched off", flag)
                return {"date": at.date(), **counts, "stopped": "disabled", "flag": flag}
            _grant(ctx, entity, at, counts, failed)
        after = page["next"]
        if after is None:
            break
    else:
        # A run may have so many steps; another one goes on. It starts with this step's checkpoint.
        ctx.step.atomic(
            "continue", lambda after=after: recurring_credits.start({"at": at, "after": after}).pk
        )
    if failed:
        raise NonRetriableError(
            f"{len(failed)} account(s) failed and {counts['granted']} got their credits; the next night tries"
            f" again. Failed: {', '.join(failed[:20])}"
        )
    return {"date": at.date(), **counts}


def _find(ctx: Any, number: int, at: datetime, after: str) -> dict[str, Any]:
    name = f"find-eligible-entities-{number}" if number else "find-eligible-entities"
    limit = option("pricing.credits.page_size")
    return ctx.step.run(name, ports.billing().due_page, at, after=after, limit=limit)


def _grant(ctx: Any, entity: str, at: datetime, counts: dict[str, int], failed: list[str]) -> None:
    try:
        outcome = ctx.step.atomic(f"grant-credits-{entity}", ports.billing().grant, entity, at)
    except StepError:
        failed.append(entity)
        return
    counts["granted" if "credits" in outcome else "skipped"] += 1
    counts["credits"] += outcome.get("credits", 0)


def _instant(ctx: Any) -> datetime:
    """Return what the run is for, not when it happens to work: a retry past midnight changes nothing."""
    given = _given(ctx).get("at")
    return (ctx.scheduled_for or given or ctx.now).astimezone(UTC)


def _given(ctx: Any) -> dict[str, Any]:
    return ctx.event.data if ctx.event else {}

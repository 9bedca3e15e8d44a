"""
What the stock jobs can be told: ``DJANGO_JOBS["CATALOG"]``, over the defaults below.

Read live. Lower-case keys are options, named by their dotted path (``email.onboarding_schedule``);
``DAY`` and ``PORTS`` are about the machinery. What a host gives for a key replaces the default whole.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from django_jobs.conf import conf

MONTH = "month"

DEFAULTS: dict[str, Any] = {
    #: How long a day of the onboarding schedule lasts; a demo makes it shorter.
    "DAY": timedelta(days=1),
    #: Adapters by dotted path; see ``ports``.
    "PORTS": {},
    "email": {
        "onboarding_schedule": [(0, "welcome"), (2, "getting-started"), (7, "tips"), (14, "check-in")],
        #: Sender by category: default, support, marketing. One not given is DEFAULT_FROM_EMAIL.
        "senders": {},
        #: What mails call the product, and where it is.
        "product": {"name": "", "url": ""},
    },
    "pricing": {
        "plans": {
            "free": {"credits": 5, "credit_interval": 30},
            "starter": {"credits": 10, "credit_interval": 30},
            "pro": {"credits": 50, "credit_interval": 30},
        },
        "credits": {"catch_up": "once", "page_size": 500, "pages_per_run": 15},
    },
    "webhooks": {"retention_days": 30},
}


@dataclass(frozen=True)
class Plan:
    """What a plan gives: ``credits`` every ``interval`` days (or every calendar month)."""

    credits: int = 0
    interval: int | str = 0
    on_trial: bool = True

    @property
    def recurs(self) -> bool:
        return self.credits > 0 and bool(self.interval)


def option(path: str) -> Any:
    """Return the option at ``path``: the host's value, else the default."""
    found, value = _lookup(conf.CATALOG, path)
    return value if found else _lookup(DEFAULTS, path)[1]


def plans() -> dict[str, Plan]:
    """Return the plans by their id; raise ``ImproperlyConfigured`` for one that makes no sense."""
    return {name: _plan(name, given) for name, given in option("pricing.plans").items()}


def _plan(name: str, given: dict[str, Any]) -> Plan:
    plan = Plan(
        credits=given.get("credits") or 0,
        interval=given.get("credit_interval") or 0,
        on_trial=given.get("grant_credits_on_trial", True),
    )
    if not _is_count(plan.credits) or not (plan.interval == MONTH or _is_count(plan.interval)):
        raise ImproperlyConfigured(
            f'DJANGO_JOBS["CATALOG"]["pricing"]["plans"]["{name}"]: credits is a whole number from 0, '
            f'credit_interval a number of days or "{MONTH}", not {given!r}.'
        )
    return plan


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _lookup(tree: Any, path: str) -> tuple[bool, Any]:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False, None
        tree = tree[part]
    return True, tree

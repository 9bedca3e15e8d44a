"""
Stock jobs for a SaaS, ready to install: ``INSTALLED_APPS += ["django_jobs.catalog"]``.

An app like any host's: it uses public names of ``django_jobs`` only. The helpers below are loaded on
first use, because Django imports this package before it knows any model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lifecycle import complete_onboarding
    from .mail import send_email, send_template_email
    from .ports import claim

__all__ = ["claim", "complete_onboarding", "send_email", "send_template_email"]

_HOME = {
    "claim": "ports",
    "complete_onboarding": "lifecycle",
    "send_email": "mail",
    "send_template_email": "mail",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

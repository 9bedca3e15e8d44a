"""
The seam between the stock jobs and the host: small protocols, each with a shipped adapter.

A job speaks to a port and never to a model. A host puts its own adapter into
``DJANGO_JOBS["CATALOG"]["PORTS"]`` by dotted path: a class, made without arguments, or a ready object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, cast, runtime_checkable
from uuid import UUID

from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from .options import option


@dataclass(frozen=True)
class Contact:
    """How to reach a user, and whether to."""

    user_id: Any
    email: str = ""
    name: str = ""
    locale: str = ""
    is_active: bool = True
    is_verified: bool = True
    marketing_opt_in: bool = False


@runtime_checkable
class UserDirectory(Protocol):
    """Who the users are."""

    def contact(self, user_id: Any) -> Contact | None:
        """Return the user as they are now, or None when they are gone."""

    def complete_onboarding(self, user_id: Any, *, marketing_opt_in: bool | None, locale: str) -> bool:
        """Note that a user went through the profile step; return False if they had before."""


@runtime_checkable
class BillingStore(Protocol):
    """Who has which plan and how many credits. An entity's key is a string."""

    def due_page(self, at: datetime, *, after: str, limit: int) -> dict[str, Any]:
        """
        Return ``{"entities": [keys], "next": cursor}``: those due for their plan's credits at ``at``.

        In a fixed order, starting behind the cursor ``after`` ("" at first). ``next`` is None at the end.
        """

    def grant(self, entity: str, at: datetime) -> dict[str, Any]:
        """
        Give one entity the credits due at ``at``: ``{"credits": n}``, or ``{"skipped": reason}``.

        Called in a transaction, which the claim, the balance, the ledger and the stamp share. Never
        twice for one entity and day, whoever calls, however often.
        """


@runtime_checkable
class IdempotencyStore(Protocol):
    """Keys that can be taken once."""

    def claim(self, key: str) -> bool:
        """Take ``key`` and return True, or False if it was taken. In the caller's transaction."""


@runtime_checkable
class MailSender(Protocol):
    """The mail provider."""

    def send(self, message: EmailMessage) -> str:
        """Send one message and return the provider's id for it ("" if it has none)."""

    def suppressed(self, addresses: list[str]) -> set[str]:
        """Return those of ``addresses`` that must not be written to (bounced, complained)."""


@runtime_checkable
class DeliveryStore(Protocol):
    """Which mail went out, by its dedupe key."""

    def begin(self, key: str, run_id: UUID) -> dict[str, Any] | None:
        """Claim the sending for ``run_id``: None to go ahead, or what there is to say instead."""

    def sent(self, key: str, provider_id: str) -> None:
        """Note that the mail is out; a later ``begin`` says so."""

    def failed(self, key: str, run_id: UUID) -> None:
        """Note that ``run_id`` gave up; a later run may try again."""


_ADAPTERS = {
    "users": (UserDirectory, "django_jobs.catalog.adapters.DjangoUsers"),
    "billing": (BillingStore, "django_jobs.catalog.accounts.CatalogBilling"),
    "claims": (IdempotencyStore, "django_jobs.catalog.adapters.WebhookClaims"),
    "mail": (MailSender, "django_jobs.catalog.adapters.DjangoMail"),
    "deliveries": (DeliveryStore, "django_jobs.catalog.adapters.DeliveryLogStore"),
}
_loaded: dict[str, Any] = {}


def users() -> UserDirectory:
    return cast(UserDirectory, _port("users"))


def billing() -> BillingStore:
    return cast(BillingStore, _port("billing"))


def claims() -> IdempotencyStore:
    return cast(IdempotencyStore, _port("claims"))


def mail() -> MailSender:
    return cast(MailSender, _port("mail"))


def deliveries() -> DeliveryStore:
    return cast(DeliveryStore, _port("deliveries"))


def claim(key: str) -> bool:
    """
    Take ``key`` once: True for the one who got it, False for everybody after.

    Do it in the transaction of the work that it guards: a claim that commits before a crash would
    otherwise keep the work from ever being done.
    """
    return claims().claim(key)


def _port(name: str) -> Any:
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def _load(name: str) -> Any:
    protocol, default = _ADAPTERS[name]
    path = option("PORTS").get(name, default)
    where = f'DJANGO_JOBS["CATALOG"]["PORTS"]["{name}"]'
    try:
        found: Callable[[], Any] | Any = import_string(path)
    except ImportError as error:
        raise ImproperlyConfigured(f"{where}: {error}") from error
    adapter = found() if isinstance(found, type) else found
    if not isinstance(adapter, protocol):
        wanted = ", ".join(name for name in vars(protocol) if not name.startswith("_"))
        raise ImproperlyConfigured(f"{where}: {path} is no {protocol.__name__}; that has: {wanted}.")
    return adapter


def _reset(*, setting: str, **kwargs: Any) -> None:
    if setting == "DJANGO_JOBS":
        _loaded.clear()


setting_changed.connect(_reset, dispatch_uid="django_jobs.catalog.ports")

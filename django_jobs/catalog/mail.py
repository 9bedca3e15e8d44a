"""
A mail as an event: what it may hold, how it becomes a message, and the helpers that emit it.
"""

from email.utils import getaddresses, parseaddr
from typing import Any
from uuid import UUID, uuid5

from django.conf import settings
from django.core.mail import EmailMultiAlternatives
from django.template import Context, Template, TemplateDoesNotExist
from django.template.backends.django import Template as DjangoTemplate
from django.template.loader import get_template

from django_jobs import NonRetriableError, emit

from .options import option
from .text import html_to_text

CATEGORIES = ("transactional", "marketing")


def send_email(
    to: str | list[str],
    subject: str,
    *,
    text: str = "",
    html: str = "",
    from_email: str = "",
    reply_to: str | list[str] = "",
    headers: dict[str, str] | None = None,
    category: str = "transactional",
    user_id: Any = None,
    dedupe_key: str = "",
    tags: list[str] | None = None,
) -> UUID:
    """
    Have a mail sent by the job ``send-email``; return the event's id at once.

    In the caller's transaction: rolled back, nothing is sent. With a ``dedupe_key`` one mail goes out
    however often it is asked for. Several addresses in ``to`` see each other.
    """
    mail = {
        "to": to,
        "subject": subject,
        "text": text,
        "html": html,
        "from_email": from_email,
        "reply_to": reply_to,
        "headers": headers,
        "category": category,
        "user_id": user_id,
        "dedupe_key": dedupe_key,
        "tags": tags,
    }
    return emit("email/send", {name: value for name, value in mail.items() if value}).pk


def send_template_email(template: str, context: dict[str, Any] | None = None, **mail: Any) -> UUID:
    """
    Render ``<template>/subject.txt``, ``body.txt`` and ``body.html`` and have it sent; see ``send_email``.

    One of the two bodies may be missing. Rendered here and now, in the language that is active.
    """
    context = {"product": option("email.product"), **(context or {})}
    subject = " ".join(_render(f"{template}/subject.txt", context).split())
    bodies = {"text": f"{template}/body.txt", "html": f"{template}/body.html"}
    rendered: dict[str, Any] = {
        kind: text for kind, path in bodies.items() if (text := _render_if_there(path, context))
    }
    if not rendered:
        raise TemplateDoesNotExist(f"{template}/body.txt")
    return send_email(subject=subject, **rendered, **mail)


def _render_if_there(path: str, context: dict[str, Any]) -> str:
    try:
        get_template(path)
    except TemplateDoesNotExist as error:
        if error.args[0] != path:
            raise
        return ""
    return _render(path, context)


def _render(path: str, context: dict[str, Any]) -> str:
    """Render a template; plain text is not HTML, so nothing is escaped in it."""
    template = get_template(path)
    if path.endswith(".txt") and isinstance(template, DjangoTemplate):
        plain: Template = template.template
        return plain.render(Context(context, autoescape=False))
    return template.render(context)


# What a mail may hold.


def validate(mail: dict[str, Any]) -> None:
    """Raise ``NonRetriableError`` for a mail that no attempt could send. Names fields, never addresses."""
    for name in ("subject", "text", "html", "from_email", "dedupe_key"):
        _check(isinstance(mail.get(name) or "", str), f"{name} is a string")
    _check(bool(mail.get("subject")), "a subject is needed")
    _check(bool(mail.get("text") or mail.get("html")), "a body is needed, text or html")
    _check(bool(mail.get("to")), "a recipient is needed (to)")
    for name in ("to", "reply_to"):
        for address in as_list(mail.get(name)):
            _check(_is_address(address), f"{name} holds what is no e-mail address")
    category = mail.get("category") or CATEGORIES[0]
    _check(category in CATEGORIES, f"category is one of {', '.join(CATEGORIES)}")
    _check(len(mail.get("dedupe_key") or "") <= 255, "dedupe_key has at most 255 characters")
    _check_headers(mail)


def _check_headers(mail: dict[str, Any]) -> None:
    """Refuse a line break in anything that becomes a header: it would smuggle in headers of its own."""
    headers = mail.get("headers") or {}
    _check(isinstance(headers, dict), "headers is a dict")
    lines = [mail["subject"], mail.get("from_email") or "", *headers, *headers.values()]
    lines += [*as_list(mail["to"]), *as_list(mail.get("reply_to"))]
    for line in lines:
        _check(isinstance(line, str), "headers holds strings")
        _check(not {"\n", "\r", "\0"} & set(line), "a header holds a line break")


def _check(is_right: bool, rule: str) -> None:
    if not is_right:
        raise NonRetriableError(f"The mail cannot be sent: {rule}.")


def _is_address(value: Any) -> bool:
    if not isinstance(value, str) or len(getaddresses([value])) != 1:
        return False
    local, at, domain = parseaddr(value)[1].rpartition("@")
    return bool(local and at and domain) and not any(character.isspace() for character in local + domain)


def as_list(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return [value] if value else []


# From mail to message.


def message(mail: dict[str, Any], run_id: UUID) -> EmailMultiAlternatives:
    """
    Return the mail as Django's message.

    Its Message-ID is the same in every attempt, so that a mailbox which gets it twice can tell.
    """
    sender, html = _sender(mail), mail.get("html") or ""
    headers = {"Message-ID": _message_id(mail, run_id, sender), **(mail.get("headers") or {})}
    built = EmailMultiAlternatives(
        subject=mail["subject"],
        body=mail.get("text") or html_to_text(html),
        from_email=sender,
        to=as_list(mail["to"]),
        reply_to=as_list(mail.get("reply_to")) or None,
        headers=headers,
    )
    if html:
        built.attach_alternative(html, "text/html")
    if mail.get("tags"):
        built.tags = list(mail["tags"])  # type: ignore[attr-defined]  # django-anymail's attribute
    return built


def _sender(mail: dict[str, Any]) -> str:
    """Return the sender: as given, or one of the host's identities by name or by the mail's category."""
    senders = option("email.senders")
    given = mail.get("from_email") or ("marketing" if mail.get("category") == "marketing" else "default")
    if "@" in given:
        return given
    return senders.get(given) or senders.get("default") or settings.DEFAULT_FROM_EMAIL


def _message_id(mail: dict[str, Any], run_id: UUID, sender: str) -> str:
    unique = uuid5(run_id, "mail")
    domain = parseaddr(sender)[1].rpartition("@")[2] or "localhost"
    return f"<{unique}@{domain}>"

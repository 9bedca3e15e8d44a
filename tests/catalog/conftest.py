"""Settings of the catalogue, and mail servers on the loopback that behave as told."""

import socket
from contextlib import ExitStack, contextmanager

import django
import pytest
from aiosmtpd.controller import Controller
from django.conf import settings
from django.test import override_settings


@pytest.fixture
def overrides():
    """Settings changed one upon the other, and taken back in the opposite order."""
    with ExitStack() as stack:
        yield lambda **jobs: stack.enter_context(
            override_settings(DJANGO_JOBS={**settings.DJANGO_JOBS, **jobs})
        )


@pytest.fixture
def catalog(overrides):
    """Set the options of the catalogue for the rest of the test: ``catalog(PORTS={...}, email={...})``."""
    return lambda **options: overrides(CATALOG=options)


@pytest.fixture
def flag(overrides):
    """Set the host's flags for the rest of the test."""
    return lambda **flags: overrides(FLAGS=flags)


class Mailbox:
    """Answers each message with the next of ``answers``, then with "accepted"."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.attempts = 0
        self.accepted = []

    async def handle_DATA(self, server, session, envelope):
        self.attempts += 1
        if self.answers:
            return self.answers.pop(0)
        self.accepted.append(envelope)
        return "250 OK"


class ChoosyMailbox(Mailbox):
    """Answers each recipient so."""

    async def handle_RCPT(self, server, session, envelope, address, options):
        self.attempts += 1
        return self.answers.pop(0) if self.answers else _accept(envelope, address)


def _accept(envelope, address):
    envelope.rcpt_tos.append(address)
    return "250 OK"


@pytest.fixture
def mail_server():
    """Start a real SMTP server on the loopback and send the project's mail there."""
    running = []

    def start(mailbox):
        controller = Controller(mailbox, hostname="127.0.0.1", port=free_port())
        controller.start()
        sending = smtp_at(controller.port)
        sending.enable()
        running.append((controller, sending))
        return mailbox

    yield start
    for controller, sending in running:
        sending.disable()
        controller.stop()


def smtp_at(port):
    backend = "django.core.mail.backends.smtp.EmailBackend"
    if django.VERSION >= (6, 1):
        options = {"host": "127.0.0.1", "port": port, "timeout": 5}
        return override_settings(MAILERS={"default": {"BACKEND": backend, "OPTIONS": options}})
    return override_settings(
        EMAIL_BACKEND=backend, EMAIL_HOST="127.0.0.1", EMAIL_PORT=port, EMAIL_TIMEOUT=5, EMAIL_USE_TLS=False
    )


@pytest.fixture
def nobody_listening():
    with closed_port() as sending, sending:
        yield


@contextmanager
def closed_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # Bound and not listening: a connection is refused.
        yield smtp_at(held.getsockname()[1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

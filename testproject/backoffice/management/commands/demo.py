"""``make demo``: a back office at work, with a database of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError

from testproject.backoffice import sample

#: In seconds: until every run has ended, until the site answers, until a child that was told to stop has.
DEADLINE, START, STOP = 120, 30, 45


class Command(BaseCommand):
    help = "Migrate, seed, start the site and runjobs, emit real events, say where to look. Ends with Ctrl-C."
    requires_system_checks = ()
    requires_migrations_checks = False

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--once", action="store_true", help="no site; end when all is done, and show the runs"
        )
        parser.add_argument("--port", type=int, default=8000, help="the first port to try (%(default)s)")

    def handle(self, *args: Any, once: bool, port: int, **options: Any) -> None:
        port = 0 if once else _free_port(port)
        if "DEMO" not in os.environ:
            _restart_as_demo(once, port)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.say("Migrating and filling the database")
        call_command("migrate", verbosity=0)
        sample.seed()
        try:
            self.run_once() if once else self.serve(port)
        except KeyboardInterrupt:
            self.say("The demo has stopped.")

    def run_once(self) -> None:
        with child("runjobs") as runjobs:
            emitted = sample.emit_events(datetime.now(UTC))
            self.say("Events are emitted, two weeks pass in about six seconds")
            done = _until(lambda: runjobs.poll() is not None or not sample.still_open(emitted), DEADLINE)
        faults = list(sample.faults(emitted))
        if not done:
            faults.append(f"after {DEADLINE} s {sample.still_open(emitted)} run(s) had not ended")
        if runjobs.returncode:
            faults.append(f"runjobs ended with {runjobs.returncode}")
        self.table(emitted)
        if faults:
            raise CommandError(
                "\n".join(["This did not end as it should:", *(f"- {fault}" for fault in faults)])
            )
        self.stdout.write(self.style.SUCCESS("Every run ended as it should."))
        self.where_mail_is(emitted)

    def serve(self, port: int) -> None:
        site = f"http://127.0.0.1:{port}/"
        with ExitStack() as children:
            started = [
                children.enter_context(child("runserver", "--noreload", f"127.0.0.1:{port}")),
                children.enter_context(child("runjobs")),
            ]
            _until(lambda: _answers(site), START)
            emitted = sample.emit_events(datetime.now(UTC))
            _until(lambda: not sample.still_open(emitted), 20)
            self.table(emitted)
            self.where_to_look(site, emitted)
            while all(process.poll() is None for process in started):
                time.sleep(0.5)
        raise CommandError("The site or runjobs has ended by itself; see above.")

    # What it says.

    def say(self, text: str) -> None:
        self.stdout.write(self.style.MIGRATE_HEADING(text))
        self.stdout.flush()

    def table(self, emitted: sample.Emitted) -> None:
        lines = [("JOB", "STATUS", "PASSES", "STEPS", "DURATION")]
        for run in sample.runs(emitted):
            took = run.finished_at - run.started_at if run.finished_at and run.started_at else None
            seconds = f"{took.total_seconds():.2f} s" if took is not None else ""
            lines.append((run.job_id, run.status, str(run.passes), str(run.step_count), seconds))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        self.stdout.write("")
        for line in lines:
            cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            style = self.style.ERROR if line[1] == "failed" else str
            self.stdout.write(style("  ".join(cells).rstrip()))
        self.stdout.write("")

    def where_to_look(self, site: str, emitted: sample.Emitted) -> None:
        login = (
            "user admin, password admin"
            if settings.DEBUG
            else "make yourself a user: manage.py createsuperuser"
        )
        self.say("Where to look")
        self.stdout.write(f"  The back office  {site}  (sign somebody up, sell a plan)")
        self.stdout.write(f"  The admin        {site}admin/  ({login})")
        self.where_mail_is(emitted)
        database = os.environ["DATABASE_URL"]
        self.stdout.write(f"  The same runs    DATABASE_URL={database} {_python()} manage.py jobs runs")
        self.stdout.write("Stop with Ctrl-C.")
        self.stdout.flush()

    def where_mail_is(self, emitted: sample.Emitted) -> None:
        if settings.MAIL_DIR:
            count = len(list(sample.mails_to(emitted.user.email)))
            self.stdout.write(f"  The mail         {settings.MAIL_DIR}  ({count} to {emitted.user.email})")


def _restart_as_demo(once: bool, port: int) -> None:
    """Begin again with the demo's own settings, which the processes it starts inherit."""
    mine = {
        "DATABASE_URL": f"sqlite:///{_own_database(once)}",
        "ONBOARDING_DAY_SECONDS": "0.4",
        "SITE_URL": f"http://127.0.0.1:{port or 8000}/",
        "DEMO": "1",
    }
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, mine | os.environ)  # noqa: S606


def _own_database(once: bool) -> Path:
    """Return the demo's SQLite file. The one that ends by itself begins afresh each time."""
    file = Path(settings.BASE_DIR) / ("demo-once.sqlite3" if once else "demo.sqlite3")
    if once and "DATABASE_URL" not in os.environ:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
    return file


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen]:
    """
    Run ``manage.py`` with ``command`` meanwhile, then stop it as a deploy does: SIGTERM, once.

    In a session of its own, so that Ctrl-C reaches it through us only: a second signal would hurry it.
    """
    manage = str(Path(settings.BASE_DIR) / "manage.py")
    process = subprocess.Popen([sys.executable, manage, *command], start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:  # noqa: S310
            return answer.status == 200
    except (URLError, OSError):
        return False


def _free_port(first: int) -> int:
    for port in range(first, first + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise CommandError(f"No free port from {first} to {first + 49}; name another with --port.")


def _python() -> str:
    return os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable

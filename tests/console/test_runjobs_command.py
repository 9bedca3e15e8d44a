"""How ``manage.py runjobs`` ends before it has begun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

ROOT = Path(__file__).parents[2]


def run_process(database, *arguments):
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "testproject.settings"}
    environment["DATABASE_URL"] = f"sqlite:///{database}"
    command = [sys.executable, "manage.py", "runjobs", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_once_does_not_wait_for_a_database_that_is_away(tmp_path):
    result = run_process(tmp_path / "no such folder" / "db.sqlite3", "--once")

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith('CommandError: The database "default" cannot be asked: ')
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--grace", "-1"], "--grace must be at least 0"),
        (["--queues", "nowhere"], "No job is in queue nowhere"),
        (["--reload"], "needs DEBUG"),
    ],
)
def test_what_it_cannot_be_told_is_a_usage_error(arguments, said):
    with pytest.raises(CommandError, match=said) as raised:
        call_command("runjobs", *arguments)
    assert raised.value.returncode == 2

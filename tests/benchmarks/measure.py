"""
Measure one database, the one that ``DATABASE_URL`` names, and write the figures as JSON.

``__main__`` starts this for each database, in a process of its own: ``measure FILE OPTIONS...``.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django

from . import options


def main(argv: list[str]) -> int:
    file, *rest = argv
    wanted = options.parse(rest)
    django.setup()
    from django.core.management import call_command

    from . import parts

    call_command("migrate", verbosity=0)
    figures = parts.Figures()
    chosen = {name: part for name, part in parts.ALL.items() if set(name.split()) & set(wanted.only)}
    failed = [name for name, part in chosen.items() if not attempt(name, part, figures, wanted)]
    report = {"database": version(), "figures": figures.all(), "failed": failed}
    Path(file).write_text(json.dumps(report))
    return 1 if failed else 0


def attempt(name: str, part: Callable[..., None], *arguments: Any) -> bool:
    """Measure one part; one that fails is reported, and the others are measured all the same."""
    begun = time.monotonic()
    try:
        part(*arguments)
    except Exception:
        print(f"{name} FAILED\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    print(f"  {name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return True


def version() -> str:
    """Return what the database is, with what it is spoken to."""
    from django.db import connection

    if connection.vendor == "sqlite":
        return f"SQLite {connection.Database.sqlite_version}"
    number = ".".join(str(part) for part in connection.get_database_version()[:2])
    name = "MariaDB" if getattr(connection, "mysql_is_mariadb", False) else connection.display_name
    driver = connection.Database
    release = getattr(driver, "release", driver)  # Where mysqlclient keeps it.
    return f"{name} {number} ({driver.__name__} {release.__version__})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

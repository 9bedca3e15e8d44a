"""
Measure the engine on each database, beside what the database could do at the most.

Ends with 0 if all of it was measured, and 1 if a database did not answer or a workload was not done
as it should be: every run completed, every step once.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import databases, options, report
from .environment import ENVIRONMENT

ROOT = Path(__file__).parent.parent.parent
FIGURES = ROOT / "docs" / "explanation" / "_figures.txt"


def main(argv: list[str]) -> int:
    wanted = options.parse(argv)
    print(report.machine(), flush=True)
    reports = [found for kind in wanted.databases if (found := _measure(kind, argv))]
    if wanted.json:
        Path(wanted.json).write_text(
            json.dumps({"machine": report.machine(), "databases": reports}, indent=1)
        )
    if wanted.write:
        FIGURES.write_text(report.page(reports, _as_typed(argv)))
    failed = [f"{found['database']}: {part}" for found in reports for part in found["failed"]]
    missing = len(wanted.databases) - len(reports)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or missing else 0


def _measure(kind: str, argv: list[str]) -> dict[str, Any] | None:
    """Measure one database in a process of its own; None if it cannot be had."""
    print(f"\n{kind}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="bench_django_jobs_") as folder:
        file = Path(folder) / "report.json"
        try:
            with databases.throw_away(kind) as url:
                subprocess.run(_command(file, argv), env=_environment(url, folder), cwd=ROOT, check=False)
        except Exception as error:
            print(f"{kind} cannot be had: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if not file.exists():
            return None
        found = json.loads(file.read_text())
    print(f"\n{report.table(found)}\n", flush=True)
    return found


def _command(file: Path, argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.measure", str(file), *argv]


def _environment(url: str, folder: str) -> dict[str, str]:
    ledger = Path(folder) / "ledger"
    ledger.touch()
    return {**os.environ, **ENVIRONMENT, "DATABASE_URL": url, "BENCH_LEDGER": str(ledger)}


def _as_typed(argv: list[str]) -> str:
    """Return the command as a reader would give it, without where the answers go."""
    options = [word for word in argv if word != "--write"]
    return f"make benchmark{f' ARGS={shlex.join(options)!r}' if options else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

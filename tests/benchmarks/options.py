"""What can be asked of ``python -m tests.benchmarks``."""

import argparse

PARTS = ("limit", "runs", "latency", "idle", "claim", "cron", "takeover", "long", "profile")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure django_jobs.")
    add = parser.add_argument
    add(
        "--databases",
        type=_names,
        default=["sqlite", "postgresql"],
        help="also mariadb (default: sqlite,postgresql)",
    )
    add("--only", type=_parts, default=PARTS, help=f"parts, of {','.join(PARTS)} (default: all)")
    add("--json", metavar="FILE", help="write every value there")
    add("--write", action="store_true", help="put the tables into docs/explanation/performance.md's figures")
    add("--explain", action="store_true", help="print the plans of a claim and a look ahead (part claim)")
    add("--repeat", type=int, default=3)
    add("--workers", type=int, default=2)
    add("--threads", type=_numbers, default=[1, 4], help="of a worker, one set-up each (default: 1,4)")
    for name, (default, words) in SIZES.items():
        add(f"--{name}", type=type(default), default=default, help=f"{words} (default: %(default)s)")
    return parser.parse_args(argv)


SIZES = {
    "limit-seconds": (1.5, "of plain INSERTs for a limit"),
    "runs": (1000, "runs without steps"),
    "fives": (300, "runs of five steps"),
    "chains": (100, "longer runs"),
    "chain-steps": (50, "steps of a longer run"),
    "long-steps": (1000, "steps of the run whose halves are compared"),
    "samples": (50, "picked-up runs"),
    "idle-seconds": (20.0, "of watching an idle cluster"),
    "rows": (1_000_000, "sleeping and as many finished runs beside a claim"),
    "claims": (50, "claims, of 8 runs each"),
    "slots": (1, "minutes to wait for a cron"),
    "profile-steps": (3000, "steps of the run looked at closely"),
    "profile-runs": (400, "runs looked at closely"),
}


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parts(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    return text.split(",")

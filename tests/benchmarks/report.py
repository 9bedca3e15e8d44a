"""The figures as tables, for the terminal and for the documentation."""

import os
import platform
import statistics
from itertools import groupby
from typing import Any

import django


def machine() -> str:
    """Say what kind of machine this is; nothing that tells which one."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, Django {django.__version__}"


def table(report: dict[str, Any]) -> str:
    """Return the figures of one database: the median, and from the least to the most of the repetitions."""
    lines = [f"| {report['database']} | median | from – to |", "|---|--:|--:|"]
    for group, figures in groupby(report["figures"], key=lambda figure: figure["group"]):
        lines.append(f"| **{group}** | | |")
        lines += [_row(figure) for figure in figures]
    return "\n".join(lines)


def _row(figure: dict[str, Any]) -> str:
    values, unit = figure["values"], figure["unit"]
    median = number(statistics.median(values))
    spread = f"{number(min(values))} – {number(max(values))}" if len(values) > 1 else ""
    return f"| {figure['name']} | {f'{median} {unit}'.strip()} | {spread} |"


def number(value: float) -> str:
    """Return ``value`` with three digits that mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def page(reports: list[dict[str, Any]], command: str) -> str:
    """Return what the documentation includes."""
    head = f"Measured on {machine()}, by `{command}`. Median of the repetitions, and the least and the most."
    return "\n\n".join([head, *map(table, reports)]) + "\n"

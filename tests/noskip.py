"""
With ``DJANGO_JOBS_NO_SKIP=1`` a test that skips fails: CI has everything a test could ask for.
"""

import os

import pytest


def _refuse(report):
    if os.environ.get("DJANGO_JOBS_NO_SKIP") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"Nothing may skip in this run (DJANGO_JOBS_NO_SKIP=1), and this did. {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    return _refuse((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    return _refuse((yield))

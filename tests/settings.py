"""The test project with the lab in it: jobs and a ledger for the tests that start real processes."""

import os

from testproject.settings import *  # noqa: F403
from testproject.settings import DJANGO_JOBS, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.lab"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# What a test wants other than it is in the processes it starts.
for name, read in {"LEASE_SECONDS": float, "RECYCLE": int}.items():
    if f"LAB_{name}" in os.environ:
        DJANGO_JOBS = {**DJANGO_JOBS, name: read(os.environ[f"LAB_{name}"])}

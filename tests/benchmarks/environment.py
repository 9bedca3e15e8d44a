"""What the measured processes get: nothing that is for development, and no log line for each run."""

ENVIRONMENT = {
    "DEBUG": "0",
    "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
    "JOBS_LOG_LEVEL": "WARNING",
    "PYTHONUNBUFFERED": "1",
}

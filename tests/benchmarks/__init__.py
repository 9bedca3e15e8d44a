"""What the engine does in a second, beside what the database could: ``python -m tests.benchmarks``."""

"""The truth: every status is written by a method in this package and nowhere else."""

from .attempt import Attempt
from .event import Event
from .job import Job
from .lane import Lane, Seat
from .run import FINAL, MOVES, OPEN, Run, RunStatus
from .step import Step, StepKind, StepStatus
from .worker import Worker

__all__ = [
    "FINAL",
    "MOVES",
    "OPEN",
    "Attempt",
    "Event",
    "Job",
    "Lane",
    "Run",
    "RunStatus",
    "Seat",
    "Step",
    "StepKind",
    "StepStatus",
    "Worker",
]

"""The truth: every status is written by a method in this package and nowhere else."""

from .attempt import Attempt
from .event import Event
from .job import Job, PauseMode
from .lane import Lane, Seat
from .listener import Delivery, Listener
from .log import Log
from .operation import Operation, OperationStatus
from .run import FINAL, MOVES, OPEN, Run, RunStatus
from .step import Step, StepKind, StepStatus
from .worker import Worker

__all__ = [
    "FINAL",
    "MOVES",
    "OPEN",
    "Attempt",
    "Delivery",
    "Event",
    "Job",
    "Lane",
    "Listener",
    "Log",
    "Operation",
    "OperationStatus",
    "PauseMode",
    "Run",
    "RunStatus",
    "Seat",
    "Step",
    "StepKind",
    "StepStatus",
    "Worker",
]

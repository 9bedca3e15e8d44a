"""
The django-q2 cluster that ``manage.py runjobs`` is, hardened.

Parent -> guard (django-q2's Sentinel) -> one pusher and the workers. Between any two of them there is a
socket pair and nothing else, so none can be killed at a moment that freezes the others, and each
notices at once when the one above it is gone, and ends too. Only the parent acts on signals.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawValue
from typing import Any
from uuid import uuid4

from django.db import connections
from django_q.cluster import Cluster, Sentinel, get_mp_context
from django_q.conf import Conf, setproctitle

from . import __version__, channel, clock, signals
from .broker import RunBroker
from .conf import conf
from .models import Worker as WorkerRow
from .pusher import Pusher
from .scheduler import CLUSTER
from .worker import Worker

#: A guard that has not been heard, or a pusher that has not come round, for so long is replaced.
GUARD_SILENT = 20.0
PUSHER_STUCK = 90.0

STOP, STOP_NOW, DRAIN, FINISH, QUIET, ALONE, PULSE = b"S", b"N", b"D", b"F", b"Q", b"A", b"."


@dataclass(frozen=True)
class Options:
    """What ``runjobs`` was asked to be."""

    workers: int
    threads: int
    queues: tuple[str, ...] = ()
    grace: float = 30
    once: bool = False


class Guard(Sentinel):
    """Starts the pusher and the workers, replaces those that die, and stops them in order."""

    def __init__(self, options: Options, parent: socket.socket) -> None:
        self.options = options
        self.parent = parent
        self.me = WorkerRow(
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            version=__version__,
            queues=list(options.queues),
            processes=options.workers,
            threads=options.threads,
            started_at=clock.now(),
        )
        broker = RunBroker(queues=options.queues, worker=str(self.me))
        super().__init__(multiprocessing.Event(), multiprocessing.Event(), uuid4(), broker, start=False)
        self.pulse = RawValue("d", time.monotonic())
        self.pool_size = options.workers
        self.pool: list[Any] = []
        #: Workers that end by themselves: for one run only, or without a line since their pusher died.
        self.leaving: list[Any] = []
        self.start()

    def start(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _title("guard")
        self.spawn_cluster()
        self.guard()

    # Children.

    def spawn_cluster(self) -> None:
        disconnect()
        self.pool = []
        self.spawn_pusher()
        for _ in range(self.pool_size):
            self.spawn_worker()

    def spawn_pusher(self) -> None:
        self.pusher_line, line = socket.socketpair()
        self.pulse.value = time.monotonic()
        self.pusher = self._fork(partial(self._be_pusher, line))
        line.close()

    def spawn_worker(self, alone: bool = False) -> None:
        """Start a worker of the pool, or one for a single run, which nobody replaces when it is done."""
        control, there = socket.socketpair()
        ours, theirs = channel.pair()
        work = partial(self._be_worker, theirs, there, alone)
        worker = self._fork(work, control, ours, daemon=Conf.DAEMONIZE_WORKERS)
        worker.control = control
        (self.leaving if alone else self.pool).append(worker)
        there.close()
        theirs.close()
        try:
            channel.hand_over(self.pusher_line, ours)
        except OSError:
            ours.close()  # The pusher is gone: this worker ends too, and both are replaced.

    def _fork(self, body: Callable[[], None], *ends: Any, daemon: bool = True) -> Any:
        """Start ``body`` in a child that keeps no end of a line that is not its own."""
        controls = [worker.control for worker in (*self.pool, *self.leaving)]
        not_its_own = [self.parent, self.pusher_line, *controls, *ends]
        process = get_mp_context().Process(target=_be_child, args=(body, not_its_own), daemon=daemon)
        process.born = time.monotonic()
        process.start()
        return process

    def _be_pusher(self, line: socket.socket) -> None:
        _title("pusher")
        Pusher(self.broker, line, me=self.me, once=self.options.once, pulse=self.pulse).work()

    def _be_worker(self, line: channel.Channel, control: socket.socket, alone: bool) -> None:
        _title("worker")
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not SIG_IGN, which the programs that a step starts would inherit.
            signal.signal(number, lambda *_: None)
        threads = 1 if alone else self.options.threads
        Worker(line, control, self.broker, threads=threads, alone=alone).work()

    # Guarding.

    def guard(self) -> None:
        self.start_event.set()
        while (order := self._listen(0.5)) is None:
            self._replace_the_dead()
            if time.monotonic() - self.pulse.value > PUSHER_STUCK:
                signals.log_stuck("pusher", self.pusher.pid)
                self.pusher.kill()
        self.stop(0 if order == STOP_NOW else self.options.grace)

    def _listen(self, timeout: float) -> bytes | None:
        """Wait for a child's death or a word from either side; return an order to stop, if that is it."""
        lines = [self.parent, self.pusher_line] if self.pusher.is_alive() else [self.parent]
        ready = wait([*lines, *self._sentinels()], timeout)
        if self.pusher_line in ready:
            self._hear_the_pusher()
        try:
            self.parent.sendall(PULSE)
            order = self.parent.recv(1) if self.parent in ready else None
        except OSError:
            order = b""
        if order == b"":
            self._end_with_the_parent()
        return order

    def _hear_the_pusher(self) -> None:
        try:
            word = self.pusher_line.recv(1)
        except OSError:
            return  # It is dead, which is about to be noticed.
        if word == ALONE and not self.stop_event.is_set():
            self.spawn_worker(alone=True)
        elif word == QUIET:
            self._tell(QUIET, self.parent)

    def _sentinels(self) -> list[int]:
        living = (*self.pool, *self.leaving, self.pusher)
        return [process.sentinel for process in living if process.is_alive()]

    def _end_with_the_parent(self) -> None:
        for process in (*self.pool, *self.leaving, self.pusher):
            process.kill()
        os._exit(1)

    def _replace_the_dead(self) -> None:
        for worker in [worker for worker in self.leaving if not worker.is_alive()]:
            worker.join()
            worker.control.close()
            self.leaving.remove(worker)
        if not self.pusher.is_alive():
            self.reincarnate(self.pusher)
        for worker in [worker for worker in self.pool if not worker.is_alive()]:
            self.reincarnate(worker)

    def reincarnate(self, process: Any) -> None:
        """Start another process in place of one that died, or that had done its share."""
        process.join()
        if time.monotonic() - process.born < 1:
            time.sleep(0.5)  # Dying as they are born: do not burn the processor over it.
        if process is self.pusher:
            signals.log_replaced("pusher", process.pid, process.exitcode)
            self.pusher_line.close()
            # A fresh pool at once, for a step may last hours.
            self.leaving, self.pool = self.leaving + self.pool, []
            self.spawn_pusher()
            for _ in range(self.pool_size):
                self.spawn_worker()
        else:
            signals.log_replaced("worker", process.pid, process.exitcode)
            process.control.close()
            self.pool.remove(process)
            self.spawn_worker()
        self.reincarnations += 1

    # Stopping.

    def stop(self, grace: float = 0) -> None:
        """
        Stop claiming, let the steps in hand be finished for ``grace`` seconds, then end what is left.

        The pusher goes last: it hands back the runs of workers that had to be killed.
        """
        self.stop_event.set()
        until = time.monotonic() + grace
        workers = self.pool + self.leaving
        self._tell(DRAIN, self.pusher_line, *(worker.control for worker in workers))
        while any(worker.is_alive() for worker in workers) and time.monotonic() < until:
            if self._listen(0.1) == STOP_NOW:
                until = 0
        for worker in workers:
            worker.kill()
            worker.join()
        self._tell(FINISH, self.pusher_line)
        self.pusher.join(5)
        self.pusher.kill()

    def _tell(self, order: bytes, *lines: socket.socket) -> None:
        for line in lines:
            try:
                line.sendall(order)
            except OSError:
                pass  # Gone already.


class JobsCluster(Cluster):
    """The parent: takes the signals, and starts another guard if the one there is dies or hangs."""

    def __init__(self, options: Options, changed: Callable[[], bool] = lambda: False) -> None:
        Conf.CLUSTER_NAME = CLUSTER
        super().__init__()
        self.options = options
        self.changed = changed
        self.signals = 0
        self.reload = False

    def sig_handler(self, signum: int, frame: Any) -> None:
        # Nothing else in here: whatever a handler waits for may be what it has interrupted.
        self.signals += 1

    def start(self) -> int:
        """Run until stopped; return the exit code: 0 for a clean stop, 1 if stopped at once or unable to run."""
        _title("parent")
        stops_sent = deaths = 0
        self._spawn_guard()
        while True:
            quiet = self._listen()
            self.reload = self.reload or self.changed()
            wanted = max(self.signals, int(quiet or self.reload))
            if wanted > stops_sent:
                stops_sent = min(wanted, 2)
                self._order(STOP if stops_sent == 1 else STOP_NOW)
            if not self.sentinel.is_alive():
                self.line.close()
                if stops_sent:
                    return 0 if stops_sent == 1 else 1
                deaths = deaths + 1 if time.monotonic() - self.born < 5 else 1
                if deaths > 3:
                    return 1
                signals.log_replaced("guard", self.sentinel.pid, self.sentinel.exitcode)
                self._spawn_guard()
            elif not stops_sent and time.monotonic() - self.heard_at > GUARD_SILENT:
                signals.log_stuck("guard", self.sentinel.pid)
                self.sentinel.kill()

    def _spawn_guard(self) -> None:
        disconnect()
        self.line, there = socket.socketpair()
        self.born = self.heard_at = time.monotonic()
        self.sentinel = get_mp_context().Process(target=self._be_guard, args=(there,))
        self.sentinel.start()
        there.close()

    def _be_guard(self, there: socket.socket) -> None:
        self.line.close()
        Guard(self.options, there)

    def _listen(self) -> bool:
        """Wait a moment for the guard; return whether it says that there is nothing left to do."""
        if self.line not in wait([self.line, self.sentinel.sentinel], 0.2):
            return False
        try:
            heard = self.line.recv(1024)
        except OSError:
            heard = b""
        if heard:
            self.heard_at = time.monotonic()
        else:
            self.sentinel.join(1)
        return QUIET in heard

    def _order(self, order: bytes) -> None:
        try:
            self.line.sendall(order)
        except OSError:
            pass  # It is gone, which is what was wanted.


def _be_child(body: Callable[[], None], not_its_own: Iterable[Any]) -> None:
    # Kept open here, an end would hide from the one at the other that the guard, or the pusher, is gone.
    for end in not_its_own:
        end.close()
    body()


def disconnect() -> None:
    """Close this process's database connections: a child that used them too would garble both."""
    for connection in connections.all(initialized_only=True):
        connection.close()
        if hasattr(connection, "close_pool"):
            connection.close_pool()


def default_options() -> Options:
    workers = conf.WORKERS or multiprocessing.cpu_count()
    return Options(workers=workers, threads=conf.THREADS, grace=conf.GRACE_SECONDS)


def _title(part: str) -> None:
    if setproctitle:
        setproctitle.setproctitle(f"runjobs {part}")

"""
A worker process: a few threads, each with a run in hand, and a heartbeat that keeps their leases.

The threads take turns at the pusher's line. The main thread watches the guard's line and renews the
leases; when it stands still (SIGSTOP, a swap storm), so do they, and the runs go on elsewhere.
"""

import os
import select
import socket
import threading
import time
from typing import Any
from uuid import UUID

from django.db import InterfaceError, OperationalError, connections, reset_queries, router

from . import executor, overdue, signals
from .broker import RunBroker
from .channel import Channel, Closed
from .conf import conf
from .models import Run
from .perform import Try

#: A lease is renewed this many times in its length.
BEATS_PER_LEASE = 3


class Worker:
    def __init__(
        self, line: Channel, control: socket.socket, broker: RunBroker, *, threads: int, alone: bool = False
    ) -> None:
        self.line = line
        self.control = control
        self.broker = broker
        self.alone = alone
        self.in_hand: dict[UUID, UUID] = {}
        #: The pass that each thread is in, and those that have been given up. (Runs claimed at once share a lease.)
        self.passes: dict[threading.Thread, overdue.Hold] = {}
        self.given_up: set[overdue.Hold] = set()
        #: Steps that took too long, of which the database is yet to be told.
        self.untold: dict[overdue.Hold, list[Try]] = {}
        self.stopping = False
        self.runs_left = conf.RECYCLE or -1
        self.threads = [threading.Thread(target=self._take_runs, daemon=True) for _ in range(threads)]

    def work(self) -> None:
        """Take runs until told to stop; end at once, as if killed, when the guard is gone."""
        self.line.send(("ready", (os.getpid(), len(self.threads), self.alone)))
        for thread in self.threads:
            thread.start()
        while self._is_needed():
            self._watch(conf.LEASE_SECONDS / BEATS_PER_LEASE)
        connections.close_all()

    def stop(self) -> None:
        """Take no more runs; a run in hand is handed back after its step."""
        if not self.stopping:
            self.stopping = True
            try:
                self.line.send(("retire", None))
            except Closed:
                pass

    # The main thread.

    def _is_needed(self) -> bool:
        return any(
            thread.is_alive() and self.passes.get(thread) not in self.given_up for thread in self.threads
        )

    def _watch(self, beat: float) -> None:
        """Wait for orders until the next beat, then renew the leases."""
        until = time.monotonic() + beat
        while (left := until - time.monotonic()) > 0 and self._is_needed():
            self._give_up_the_overdue()
            # A short wait, because a thread that ends does not end it.
            ready, _, _ = select.select([self.control], [], [], min(left, 0.2))
            if ready:
                if not self.control.recv(1):
                    os._exit(1)  # Orphaned. Other clusters must not have to share runs with a ghost.
                self.stop()
        self._renew()

    def _give_up_the_overdue(self) -> None:
        """Let the runs of steps that take too long go on elsewhere. Their threads are lost, so this process retires."""
        for hold, tries in overdue.take().items():
            self.untold.setdefault(hold, []).extend(tries)
            signals.log_step_stuck(tries[0].current.run, [one.step.name for one in tries])
            self.given_up.add(hold)
            self._let_go(hold)
            self.stop()
        for hold, tries in list(self.untold.items()):
            try:
                overdue.give_up(tries)
                del self.untold[hold]
            except (OperationalError, InterfaceError) as error:
                # A database that is away, or SQLite's only writer is the stuck step itself. Tried again; if this
                # process ends before, the run counts a crash instead.
                signals.log_not_given_up(tries[0].current.run, error)
                connections.close_all()

    def _renew(self) -> None:
        leases = list(self.in_hand.items())
        if not leases:
            return
        try:
            Run.objects.using(router.db_for_write(Run)).renew(leases)
        except (OperationalError, InterfaceError) as error:
            signals.log_not_renewed(len(leases), error)
            connections.close_all()

    # The other threads.

    def _take_runs(self) -> None:
        try:
            while True:
                self._perform(self.line.receive())
        except Closed:
            self.stop()  # Told to, or the pusher is gone; the guard starts another worker.
        finally:
            connections.close_all()

    def _perform(self, message: Any) -> None:
        done, thread = None, threading.current_thread()
        drop_dead_connections()
        try:
            if isinstance(message, Run):
                done = message.hold
                self.in_hand.update([message.hold])
                self.passes[thread] = message.hold
                executor.execute(message, stopping=lambda: self.stopping)
            else:
                self.broker.perform(*message)
        except BaseException as error:
            # Whatever it was, this thread goes on, and the pusher hears that it is free.
            signals.log_pass_broken(message, error)
        finally:
            self.passes.pop(thread, None)
            if done:
                self._let_go(done)
            tidy_connections()
        self.line.send(("done", done))
        self.runs_left -= 1
        if self.runs_left == 0:
            self.stop()

    def _let_go(self, hold: overdue.Hold) -> None:
        """Renew a lease no longer; not that of another claim, when the run is in this worker's hands a second time."""
        if self.in_hand.get(hold[0]) == hold[1]:
            self.in_hand.pop(hold[0], None)


def drop_dead_connections() -> None:
    """
    Close this thread's connections that ended while it was idle, so that no query of a job finds that out.

    No statement: an idle connection has nothing to read, unless it is the news that the server closed it.
    """
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block and _has_news(connection.connection):
            connection.close()


def _has_news(connection: Any) -> bool:
    if not hasattr(connection, "fileno"):
        return False  # Not open, or SQLite's.
    try:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        return bool(poll.poll(0))
    except Exception:  # Each driver has its own error for a connection that it knows to be closed.
        return True


def tidy_connections() -> None:
    """
    Close this thread's connections that broke or are older than ``CONN_MAX_AGE``.

    An age of 0, Django's default, is meant for requests: here it would mean a connection per run.
    """
    for connection in connections.all(initialized_only=True):
        if connection.errors_occurred or connection.settings_dict["CONN_MAX_AGE"]:
            connection.close_if_unusable_or_obsolete()
    reset_queries()

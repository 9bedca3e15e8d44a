"""
The process that claims due runs for the free slots of its workers, and keeps the cluster's timers.

It knows which run each worker has, because it sent it there. When a worker dies its line ends, and
the leases it had are ended with it, so its runs go on elsewhere at once.
"""

import selectors
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import InterfaceError, OperationalError, connections, router

from . import clock, scheduler, services, signals, wakeup
from .broker import Outlook, RunBroker
from .channel import Channel, Closed
from .conf import conf
from .models import Run, Worker

#: How often the registry is written down and the Schedule rows are mended, and the cluster's own row kept fresh.
RECONCILE = 60.0
HEARTBEAT = 10.0

#: The shortest time between two looks ahead.
LOOK_AHEAD = 0.25


@dataclass
class Line:
    """A worker process: its channel, how many more runs it would take, and the runs it has."""

    channel: Channel
    pid: int = 0
    free: int = 0
    retiring: bool = False
    in_hand: dict[UUID, UUID] = field(default_factory=dict)


class Pusher:
    def __init__(
        self, broker: RunBroker, control: socket.socket, *, me: Worker, once: bool, pulse: Any
    ) -> None:
        self.broker = broker
        self.control = control
        self.me = me
        self.once = once
        self.pulse = pulse
        self.using = router.db_for_write(Run)
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, None)
        self.bell = wakeup.bell(self.using)
        self.bell_line: tuple[int, Any] | None = None
        self.lines: list[Line] = []
        self.draining = self.finished = self.away = False
        self.look = True  # Something may be due.
        self.stirred = True  # Something happened since the last look ahead.
        self.outlook = Outlook(None, None, False)
        self.looked_ahead = self.reconciled = self.beaten = float("-inf")

    def work(self) -> None:
        """Go on until told to finish; a database that is away is waited for."""
        while not (self.finished and not self.lines):
            self.pulse.value = time.monotonic()
            try:
                self._turn()
            except (OperationalError, InterfaceError) as error:
                self._away(error)
                self._serve(self.selector.select(1.0))
        self._leave()

    def _turn(self) -> None:
        if not self.draining:
            self._keep_house()
            self._dispatch()
            self._look_ahead()
            self._dispatch()
            self._quit_if_done()
        if self.away:
            self.away = False
            signals.log_database_back(self.using)
        self._wait()

    def _away(self, error: Exception) -> None:
        if not self.away:
            signals.log_database_away(self.using, error)
        self.away, self.look = True, True
        self._mute()
        connections[self.using].close()

    def _mute(self) -> None:
        if self.bell_line:
            self.selector.unregister(self.bell_line[0])
            self.bell_line = None

    # What is done at intervals.

    def _keep_house(self) -> None:
        now = time.monotonic()
        if now - self.reconciled >= RECONCILE:
            services.sync(self.using)
            scheduler.reconcile()
            services.check_clock(self.using)
            self._bury_the_dead()
            self.reconciled, self.looked_ahead = now, float("-inf")
        if now - self.beaten >= HEARTBEAT:
            self.beat()
            self.beaten = now
        if self.outlook.schedule and self.outlook.schedule <= clock.now():
            scheduler.tick()
            self.broker.fire_others()
            self.look, self.looked_ahead = True, float("-inf")
        if self.outlook.run and self.outlook.run <= clock.now():
            self.look, self.outlook = True, self.outlook._replace(run=None)

    def beat(self) -> None:
        """Keep this cluster's row fresh; a row that was pruned comes back."""
        self.me.heartbeat_at = clock.now()
        self.me.busy = sum(len(line.in_hand) for line in self.lines)
        workers = Worker.objects.using(self.using)
        if not workers.filter(pk=self.me.pk).update(heartbeat_at=self.me.heartbeat_at, busy=self.me.busy):
            self.me.save(using=self.using, force_insert=True)

    def _bury_the_dead(self) -> None:
        """Remove the rows of clusters that were killed, once nobody wonders about them any more."""
        long_ago = clock.now() - timedelta(days=1)
        Worker.objects.using(self.using).filter(heartbeat_at__lt=long_ago).delete()

    def _look_ahead(self) -> None:
        """Learn when the next run, schedule or message is due, once nothing is due now."""
        idle_for = time.monotonic() - self.looked_ahead
        if self.look or idle_for < (LOOK_AHEAD if self.stirred else conf.POLL_SECONDS):
            return
        self.outlook = self.broker.outlook()
        self.looked_ahead, self.stirred = time.monotonic(), False
        self.look = self.outlook.mail or bool(self.outlook.run and self.outlook.run <= clock.now())
        if not self.look:
            self.bell.calm()

    # Runs.

    def _dispatch(self) -> None:
        """Claim as many due runs as there are free slots and spread them over the workers."""
        while self.look and (slots := sum(line.free for line in self.lines if not line.retiring)):
            found = self.broker.dequeue(slots)
            for _, run in found:
                self._send(run)
            if self.outlook.mail and len(found) < slots:
                found += self._dispatch_mail(slots - len(found))
            self.look = len(found) == slots
            if found:
                self.stirred = True
                self.bell.busy()

    def _dispatch_mail(self, slots: int) -> list[Any]:
        messages = self.broker.messages(slots)
        for message in messages:
            line = self._freest()
            line.free -= 1
            self._say(line, message)
        self.outlook = self.outlook._replace(mail=False)
        return messages

    def _send(self, run: Run) -> None:
        line = self._freest()
        line.free -= 1
        line.in_hand.update([run.hold])
        self._say(line, run)

    def _say(self, line: Line, message: Any) -> None:
        try:
            line.channel.send(message)
        except Closed:
            pass  # The end of this line is about to be noticed, and what it had in hand released.

    def _freest(self) -> Line:
        return max((line for line in self.lines if not line.retiring), key=lambda line: line.free)

    def _quit_if_done(self) -> None:
        """With ``--once``: say so when nothing is due and nothing in hand."""
        idle = [line for line in self.lines if line.free == self.me.threads]
        quiet = not self.look and not self.stirred and not self.outlook.mail
        if self.once and quiet and len(idle) == self.me.processes:
            self.control.sendall(b"Q")
            self.once = False

    # Waiting.

    def _wait(self) -> None:
        """Wait until a worker, the bell, a timer or the guard calls for another turn."""
        until = self._next_turn()
        timeout = 0.0
        while True:
            self._listen()
            self._serve(self.selector.select(timeout))
            self.pulse.value = time.monotonic()
            if not self.draining and self.bell.rung():
                self.stirred = True
                if self.bell.is_sure:
                    self.look = True
                else:
                    self.looked_ahead = float("-inf")
                    return
            left = until - time.monotonic()
            if left <= 0 or (self.look and not self.draining and any(line.free for line in self.lines)):
                return
            timeout = min(left, self.bell.pause)

    def _next_turn(self) -> float:
        """Return when the next timer is up, on the monotonic clock."""
        now, wall = time.monotonic(), clock.now()
        if self.draining:
            return now + 0.2
        timers = [now + conf.POLL_SECONDS, self.reconciled + RECONCILE, self.beaten + HEARTBEAT]
        if self.stirred and not self.look:
            timers.append(self.looked_ahead + LOOK_AHEAD)
        for due in (self.outlook.run, self.outlook.schedule):
            if due and due > wall:
                timers.append(now + (due - wall) / timedelta(seconds=1))
        return min(timers)

    def _listen(self) -> None:
        """Watch the connection in use, which may be another one than the last time."""
        line = self.bell.line()
        if line == self.bell_line:
            return
        self._mute()
        if line:
            self.selector.register(line[0], selectors.EVENT_READ, self.bell)
        self.bell_line = line

    # Lines.

    def _serve(self, events: list[Any]) -> None:
        for key, _ in events:
            if key.data is None:
                self._obey()
            elif isinstance(key.data, Line):
                self._hear(key.data)

    def _obey(self) -> None:
        """Take a new worker's line, or an order, from the guard; without a guard there is no cluster."""
        order, fds, _, _ = socket.recv_fds(self.control, 1, 1)
        if not order:
            raise SystemExit("the guard is gone")
        if fds:
            line = Line(Channel(socket.socket(fileno=fds[0])))
            self.lines.append(line)
            self.selector.register(line.channel, selectors.EVENT_READ, line)
        elif order == b"D":
            self.draining = True
            for line in self.lines:
                line.channel.finish()
        elif order == b"F":
            self.finished = True

    def _hear(self, line: Line) -> None:
        try:
            kind, value = line.channel.receive()
        except Closed:
            self._lost(line)
            return
        if kind == "ready":
            line.pid, line.free = value
        elif kind == "retire":
            line.retiring = True
            line.channel.finish()
        else:
            if value and line.in_hand.get(value[0]) == value[1]:
                del line.in_hand[value[0]]
            line.free += 1
            self.stirred = True

    def _lost(self, line: Line) -> None:
        """A worker is gone: let its runs go on elsewhere. One that was told to go has not crashed."""
        self.selector.unregister(line.channel)
        line.channel.close()
        self.lines.remove(line)
        if line.in_hand:
            self._release(list(line.in_hand.items()), line.pid, told=self.draining or line.retiring)

    def _release(self, leases: list[tuple[UUID, UUID]], pid: int, *, told: bool) -> None:
        runs = Run.objects.using(self.using)
        try:
            released = runs.hand_back(leases) if told else runs.abandon(leases)
        except (OperationalError, InterfaceError) as error:
            self._away(error)  # Their leases run out by themselves.
        else:
            signals.log_released(pid, released, told=told)
            self.look = True

    def _leave(self) -> None:
        try:
            Worker.objects.using(self.using).filter(pk=self.me.pk).delete()
        except (OperationalError, InterfaceError):
            pass  # Its heartbeat grows old instead.

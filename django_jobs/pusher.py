"""
The process that claims due runs for the free slots of its workers, and keeps the cluster's timers.

It knows which run each worker has, because it sent it there. When a worker dies its line ends, and
the leases it had are ended with it, so its runs go on elsewhere at once. A run that takes its worker down
time and again takes those beside it along; so after the second time it gets a worker of its own.
"""

import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import Error, InterfaceError, OperationalError, connections, router

from . import admission, clock, pauses, routing, scheduler, services, signals, wakeup
from .broker import Outlook, RunBroker
from .channel import Channel, Closed
from .conf import conf
from .models import Run, Worker

#: How often the registry is written down and the Schedule rows are mended, and the cluster's own row kept fresh.
RECONCILE = 60.0
HEARTBEAT = 10.0

#: The shortest time between two looks ahead; and while there is a backlog, beside which crons must not wait.
LOOK_AHEAD = 0.25
LOOK_ASIDE = 0.5

#: A schedule that stays overdue when it was fired (a broken row of the host) is tried again ever more rarely.
LONGEST_WAIT = 30.0

#: A run that took its worker down so often in a row is the next time alone in a worker.
SUSPECT = 2
#: One for which there is no such worker just now waits so long.
SUSPECTS_WAIT = timedelta(seconds=5)


@dataclass
class Line:
    """A worker process: its channel, how many more runs it would take, and the runs it has."""

    channel: Channel
    pid: int = 0
    free: int = 0
    retiring: bool = False
    #: For one run only, a suspect.
    alone: bool = False
    in_hand: dict[UUID, UUID] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return not (self.retiring or self.alone)


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
        self.suspects: list[Run] = []
        self.draining = self.finished = self.away = False
        self.look = True  # Something may be due.
        self.unrouted = True  # An event may have come.
        self.stirred = True  # Something happened since the last look ahead.
        self.outlook = Outlook()
        self.looked_ahead = self.reconciled = self.beaten = self.ticked = float("-inf")
        self.tick_pause = 0.0

    def work(self) -> None:
        """Go on until told to finish; a database that is away is waited for."""
        while not (self.finished and not self.lines):
            self.pulse.value = time.monotonic()
            try:
                self._turn()
            except Error as error:
                self._away(error)
                self._serve(self.selector.select(1.0))
        self._leave()

    def _turn(self) -> None:
        if not self.draining:
            if self.away:
                self._keep_leases()
            self._keep_house()
            self._dispatch()
            self._route()
            self._look_ahead()
            self._dispatch()
            self._quit_if_done()
        if self.away:
            self.away = False
            signals.log_database_back(self.using)
        self._wait()

    def _keep_leases(self) -> None:
        """Keep what the workers have in hand: its leases may have run out while the database was away."""
        if leases := [hold for line in self.lines for hold in line.in_hand.items()]:
            Run.objects.using(self.using).renew(leases)

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
            self.reconciled, self.looked_ahead = now, float("-inf")
            self._try("write down its jobs and crons", scheduler.write_down)
            self._try("let runs go that nothing limits any more", admission.unblock)
            self._try("compare the clocks", services.check_clock, self.using)
            self._try("remove the rows of dead clusters", self._bury_the_dead)
        if now - self.beaten >= HEARTBEAT:
            self.beat()
            self.beaten = now
            if self.broker.paused:
                self._try("skip what came for paused jobs", pauses.skip_new, self.using)
        if self._is_cron_time(now):
            self.ticked, self.tick_pause = now, min(2 * self.tick_pause + 1, LONGEST_WAIT)
            self._try("fire its crons", scheduler.tick)
            self._try("fire the host's schedules", self.broker.fire_others)
            self.look, self.looked_ahead = True, float("-inf")
        if self.outlook.run and self.outlook.run <= clock.now():
            self.look, self.outlook = True, self.outlook._replace(run=None)

    def _try(self, chore: str, work: Callable[..., Any], *arguments: Any) -> None:
        """Do what the runs do not depend on; whatever goes wrong there, they go on."""
        try:
            work(*arguments)
        except (OperationalError, InterfaceError):
            raise
        except Exception as error:
            signals.log_chore_failed(chore, error)

    def _is_cron_time(self, now: float) -> bool:
        if self.outlook.schedule and self.outlook.schedule <= clock.now():
            return True
        return self.outlook.overdue and now - self.ticked >= self.tick_pause

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
        """Learn when the next run, schedule or message is due; beside a backlog too, but not as often."""
        pause = LOOK_ASIDE if self.look else LOOK_AHEAD if self.stirred else conf.POLL_SECONDS
        if time.monotonic() - self.looked_ahead < pause:
            return
        self.outlook = self.broker.outlook()
        self.looked_ahead, self.stirred = time.monotonic(), False
        if not self.outlook.overdue:
            self.tick_pause = 0.0
        self.look = self.outlook.mail or bool(self.outlook.run and self.outlook.run <= clock.now())
        self.unrouted = self.unrouted or self.outlook.unrouted
        if not self.look:
            self.bell.calm()

    def _route(self) -> None:
        """Put a batch of events before those who listen for them; the next one in the next turn."""
        if self.unrouted:
            self.unrouted = False
            self._try("put events before those who wait for them", self._route_batch)

    def _route_batch(self) -> None:
        count = routing.route()
        self.unrouted = count == routing.BATCH
        self.look = self.look or bool(count)

    # Runs.

    def _dispatch(self) -> None:
        """Claim as many due runs as there are free slots and spread them over the workers."""
        while self.look and (slots := self._slots()):
            found = self._dispatch_mail(slots) if self.outlook.mail else 0
            runs = self.broker.dequeue(slots - found)
            for _, run in runs:
                self._send(run)
            found += len(runs)
            self.look = found == slots
            if found:
                self.stirred = True
                self.bell.busy()

    def _slots(self) -> int:
        return sum(line.free for line in self.lines if line.is_open)

    def _dispatch_mail(self, slots: int) -> int:
        """Pass on ordinary messages, into half of the slots: neither they nor the runs make the others wait."""
        messages = self.broker.messages(-(-slots // 2))
        for message in messages:
            line = self._freest()
            line.free -= 1
            self._say(line, message)
        self.outlook = self.outlook._replace(mail=False)
        return len(messages)

    def _send(self, run: Run) -> None:
        if run.crashes >= SUSPECT and self.me.threads > 1:
            self._isolate(run)
        else:
            self._give(run, self._freest())

    def _give(self, run: Run, line: Line) -> None:
        line.free -= 1
        line.in_hand.update([run.hold])
        self._say(line, run)

    def _isolate(self, run: Run) -> None:
        """Have a worker started for this run alone, or put it off if there are enough of them already."""
        if len(self.suspects) + sum(line.alone for line in self.lines) < self.me.threads:
            self.suspects.append(run)
            self.control.sendall(b"A")
        else:
            Run.objects.using(self.using).hand_back([run.hold], wait=SUSPECTS_WAIT)

    def _give_suspect(self, line: Line) -> None:
        if self.suspects:
            self._give(self.suspects.pop(0), line)
        line.channel.finish()

    def _say(self, line: Line, message: Any) -> None:
        try:
            line.channel.send(message)
        except Closed:
            pass  # The end of this line is about to be noticed, and what it had in hand released.

    def _freest(self) -> Line:
        return max((line for line in self.lines if line.is_open), key=lambda line: line.free)

    def _quit_if_done(self) -> None:
        """With ``--once``: say so when nothing is due and nothing in hand."""
        if not self.once:
            return
        idle = [line for line in self.lines if line.free == self.me.threads and not line.alone]
        busy = (
            self.look
            or self.unrouted
            or self.stirred
            or self.suspects
            or any(line.alone for line in self.lines)
        )
        if not busy and len(idle) == self.me.processes:
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
                    self.look = self.unrouted = True
                else:
                    self.looked_ahead = float("-inf")
                    return
            left = until - time.monotonic()
            if left <= 0 or (not self.draining and (self.unrouted or (self.look and self._slots()))):
                return
            timeout = min(left, self.bell.pause)

    def _next_turn(self) -> float:
        """Return when the next timer is up, on the monotonic clock."""
        now, wall = time.monotonic(), clock.now()
        if self.draining:
            return now + 0.2
        timers = [now + conf.POLL_SECONDS, self.reconciled + RECONCILE, self.beaten + HEARTBEAT]
        if self.look or self.stirred:
            timers.append(self.looked_ahead + (LOOK_ASIDE if self.look else LOOK_AHEAD))
        if self.outlook.overdue:
            timers.append(self.ticked + self.tick_pause)
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
            if self.suspects:
                self._release([run.hold for run in self.suspects], self.me.pid, told=True)
        elif order == b"F":
            self.finished = True

    def _hear(self, line: Line) -> None:
        try:
            kind, value = line.channel.receive()
        except Closed:
            self._lost(line)
            return
        if kind == "ready":
            line.pid, line.free, line.alone = value
            if line.alone:
                self._give_suspect(line)
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
        except Error as error:
            self._away(error)  # Their leases run out by themselves.
        else:
            signals.log_released(pid, released, told=told)
            self.look = True
            if released < len(leases):
                self._try("move up who waits", admission.bereave, [run for run, _ in leases])

    def _leave(self) -> None:
        try:
            Worker.objects.using(self.using).filter(pk=self.me.pk).delete()
        except Error:
            pass  # Its heartbeat grows old instead.

"""Results on their way out: back in each camera's order, then to every sink through a queue of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dapo_edge.errors import DapoEdgeError, OutputError
from dapo_edge.runtime.intake import LOOK_UP_S, Lane, Ticket
from dapo_edge.runtime.outcome import CameraEvent, Outcome
from dapo_edge.runtime.plan import Policy, SinkPlan

MOST_EVENTS = 1000  # of cameras, that wait for a sink
TOLD_EVERY_S = 60.0  # a sink may fail for a weekend

log = logging.getLogger(__name__)


class SinkQueue:
    """One sink with its thread. A sink that is slow or raises loses its own entries, and these are counted."""

    def __init__(self, plan: SinkPlan, default: Policy, wake: Callable[[], None]) -> None:
        self.sink = plan.sink
        self.policy: Policy = plan.policy or default
        self.written = self.lost = self.failed = 0
        self.error: Exception | None = None  # the first one
        self._wake = wake
        self._room, self._room_bytes = plan.queue, plan.max_bytes
        self._bytes = 0
        self._entries: deque[Outcome | CameraEvent] = deque()
        self._results = 0  # among the entries
        self._changed = threading.Condition()
        self._closed = self._aborted = False
        self._fails = False
        self._told_s = 0.0  # when a failure was last told
        self._thread = threading.Thread(target=self._work, name=f"sink {self.sink.name}", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, outcome: Outcome) -> None:
        """Queue one result by the queue's policy."""
        nbytes = outcome.nbytes
        with self._changed:
            while self._is_full(nbytes) and self.policy == "wait" and not self._aborted:
                self._changed.wait(LOOK_UP_S)
            if self._aborted:
                self.lost += 1
                return
            while self._is_full(nbytes):
                self._lose_oldest()
            self._entries.append(outcome)
            self._results += 1
            self._bytes += nbytes
            self._changed.notify_all()

    def note(self, event: CameraEvent) -> None:
        """Queue a change of state; never waits. The oldest are forgotten where thousands wait."""
        with self._changed:
            if len(self._entries) - self._results >= MOST_EVENTS:
                self._entries.remove(next(entry for entry in self._entries if isinstance(entry, CameraEvent)))
            self._entries.append(event)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will come: the thread writes what is queued, and ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether its thread still works."""
        return self._thread.is_alive()

    def join(self, until_s: float) -> None:
        """Wait for the thread to end, until a moment of the monotonic clock."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until_s - time.monotonic()))

    def abort(self) -> None:
        """Lose what is queued."""
        with self._changed:
            self._aborted = self._closed = True
            self.lost += self._results
            self._entries.clear()
            self._results = self._bytes = 0
            self._changed.notify_all()

    def as_json(self) -> dict[str, Any]:
        """As in the statistics. `lost`: there was no room, or no time at the end."""
        state = {"name": self.sink.name, "written": self.written, "lost": self.lost, "failed": self.failed}
        return state if self.error is None else {**state, "error": str(self.error)}

    def _is_full(self, more_bytes: int) -> bool:
        return self._results >= self._room or (self._results > 0 and self._bytes + more_bytes > self._room_bytes)

    def _lose_oldest(self) -> None:
        """Give up the oldest result; changes of state stay."""
        oldest = next(entry for entry in self._entries if isinstance(entry, Outcome))
        self._entries.remove(oldest)
        self._forget(oldest)
        self.lost += 1

    def _forget(self, outcome: Outcome) -> None:
        self._results -= 1
        self._bytes -= outcome.nbytes

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self.sink.write(entry) if isinstance(entry, Outcome) else self.sink.note(entry)
            except Exception as error:  # whatever a sink does, it must not touch the line
                self.failed += 1
                self._tell_failure(error)
            else:
                if isinstance(entry, Outcome):
                    self.written += 1
                    self._tell_recovery()
        try:
            self.sink.close()
        except Exception as error:
            self._tell_failure(error)
        self._wake()

    def _tell_failure(self, error: Exception) -> None:
        self.error = self.error or error
        now_s = time.monotonic()
        if not self._fails or now_s - self._told_s > TOLD_EVERY_S:
            self._told_s = now_s
            log.warning("the sink '%s' fails: %s", self.sink.name, error)
        self._fails = True

    def _tell_recovery(self) -> None:
        if self._fails:
            self._fails = False
            log.warning("the sink '%s' works again; %d entries failed so far", self.sink.name, self.failed)

    def _next(self) -> Outcome | CameraEvent | None:
        with self._changed:
            while not self._entries and not self._closed:
                self._changed.wait()
            if not self._entries:
                return None
            entry = self._entries.popleft()
            if isinstance(entry, Outcome):
                self._forget(entry)
            self._changed.notify_all()
            return entry


class Delivery:
    """Takes results from any thread in any order, and hands them to the sinks in each camera's order."""

    def __init__(self, sinks: Sequence[SinkPlan], default: Policy, wake: Callable[[], None]) -> None:
        """`default`: the policy of sinks that name none. `wake` is called when a sink has written all."""
        self.queues = [SinkQueue(plan, default, wake) for plan in sinks]
        self._orders: dict[Lane, _Order] = {}
        self._closed = False

    def start(self, lanes: Sequence[Lane]) -> None:
        """Begin; the lanes' tickets count from 0."""
        self._orders = {lane: _Order() for lane in lanes}
        for queue in self.queues:
            queue.start()

    def deliver(self, ticket: Ticket, outcome: Outcome) -> None:
        """The result of a ticket; every ticket must come to this once."""
        order = self._orders[ticket.lane]
        with order.lock:  # held while queueing: the next result of this camera must not overtake
            order.ready[ticket.number] = outcome
            while order.next in order.ready:
                self._hand_out(order.ready.pop(order.next))
                order.next += 1

    def _hand_out(self, outcome: Outcome) -> None:
        plain = outcome if all(queue.sink.draws for queue in self.queues) else outcome.without_pictures()
        for queue in self.queues:
            queue.put(outcome if queue.sink.draws else plain)

    def note(self, event: CameraEvent) -> None:
        """A camera's change of state."""
        for queue in self.queues:
            queue.note(event)

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        for queue in self.queues:
            queue.close()

    @property
    def finished(self) -> bool:
        """Whether the sinks have written all that was queued, and nothing more will come."""
        return self._closed and not any(queue.alive for queue in self.queues)

    def abort(self) -> None:
        """Lose what is queued."""
        for queue in self.queues:
            queue.abort()

    def problem(self) -> OutputError | None:
        """What went wrong with sinks, in words."""
        broken = [queue for queue in self.queues if queue.error is not None]
        if not broken:
            return None
        causes, remedies = [], []
        for queue in broken:
            error = queue.error
            known = isinstance(error, DapoEdgeError)
            cause = error.cause if isinstance(error, DapoEdgeError) else f"{type(error).__name__}: {error}"
            causes.append(f"the sink '{queue.sink.name}' failed {queue.failed} times ({cause})")
            remedies.append(error.remedy if known and isinstance(error, DapoEdgeError) else "Look at the sink")
        return OutputError("; ".join(causes), "; ".join(dict.fromkeys(remedies)))


class _Order:
    """What of one camera came before its turn."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.next = 0
        self.ready: dict[int, Outcome] = {}

"""Frames on their way to the engine: a bounded ring per camera, and the batches that are taken from all of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dapo_edge.runtime.accounting import Account, DropReason
from dapo_edge.runtime.outcome import Outcome
from dapo_edge.runtime.plan import CameraPlan, Policy
from dapo_edge.structures import Frame

LOOK_UP_S = 0.1  # how soon a thread that waits sees that it is no longer wanted


@dataclass(frozen=True, eq=False)
class Ticket:
    """One frame's turn. Results leave in the order of `number`, which counts from 0 within a lane."""

    lane: Lane
    number: int
    item: Frame | Outcome  # an outcome: the frame failed before it came here, and only its report travels on


class Lane:
    """One camera's ring."""

    def __init__(self, plan: CameraPlan, account: Account, intake: Intake) -> None:
        self.plan = plan
        self.account = account
        self.policy: Policy = plan.policy or "wait"  # until the source is open and says how its frames come
        self._intake = intake
        self._items: deque[Frame | Outcome] = deque()
        self._taken = 0

    def put(self, item: Frame | Outcome, wanted: Callable[[], bool] = lambda: True) -> None:
        """Queue a frame that its account counts as captured, by the lane's policy.

        Under `wait` it blocks while the ring is full; a frame that is no longer `wanted()` then is dropped.
        """
        changed = self._intake.changed
        with changed:
            while len(self._items) >= self.plan.queue and self.policy == "wait":
                if self._intake.aborted or not wanted():
                    self._drop(item, "shutdown")
                    return
                changed.wait(LOOK_UP_S)
            if self._intake.aborted:
                self._drop(item, "shutdown")
                return
            if len(self._items) >= self.plan.queue:
                self._drop(self._items.popleft(), "policy")
            self._items.append(item)
            changed.notify_all()

    def pop(self) -> Ticket | None:
        """The next frame that is still fresh. The caller holds the intake's lock."""
        limit_s = self.plan.max_age_s
        while self._items:
            item = self._items.popleft()
            if limit_s is not None and isinstance(item, Frame) and time.monotonic() - item.arrived_s > limit_s:
                self.account.dropped("stale")
                continue
            number, self._taken = self._taken, self._taken + 1
            return Ticket(self, number, item)
        return None

    def clear(self) -> None:
        """Drop what waits. The caller holds the intake's lock."""
        while self._items:
            self._drop(self._items.popleft(), "shutdown")

    def _drop(self, item: Frame | Outcome, reason: DropReason) -> None:
        if isinstance(item, Frame):
            self.account.dropped(reason)


class Intake:
    """All lanes, and the next batch from them: one frame of each camera by turns, so that none is starved."""

    def __init__(self, max_batch: int, window_s: float) -> None:
        self.changed = threading.Condition()
        self.aborted = False
        self.lanes: list[Lane] = []
        self._max_batch = max_batch
        self._window_s = window_s
        self._closed = False
        self._next_lane = 0
        self._collecting = threading.Lock()  # two takers would take each other's batches apart

    def add(self, plan: CameraPlan, account: Account) -> Lane:
        """A ring for one more camera."""
        lane = Lane(plan, account, self)
        self.lanes.append(lane)
        return lane

    def take(self) -> list[Ticket] | None:
        """The next batch: at least one frame, or reports only; None when nothing will come any more.

        Waits for the first frame as long as it takes, and then up to the batch window for others to join it.
        """
        with self._collecting, self.changed:
            batch: list[Ticket] = []
            until_s: float | None = None
            while True:
                self._collect(batch)
                frames = self._weight(batch)
                if batch and until_s is None:
                    until_s = time.monotonic() + (self._window_s if frames and len(self.lanes) > 1 else 0)
                if until_s is not None:
                    left_s = until_s - time.monotonic()
                    if frames >= self._max_batch or left_s <= 0 or self._closed:
                        self.changed.notify_all()  # there is room in the rings
                        return batch
                    self.changed.wait(left_s)
                elif self._closed:
                    return None
                else:
                    self.changed.wait()

    def close(self) -> None:
        """Nothing will be put any more: `take` hands out what is there, then None."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def abort(self) -> None:
        """Drop all that waits."""
        with self.changed:
            self.aborted = self._closed = True
            for lane in self.lanes:
                lane.clear()
            self.changed.notify_all()

    def _collect(self, batch: list[Ticket]) -> None:
        frames = self._weight(batch)
        empty = 0
        while frames < self._max_batch and empty < len(self.lanes):
            ticket = self.lanes[self._next_lane].pop()
            self._next_lane = (self._next_lane + 1) % len(self.lanes)
            if ticket is None:
                empty += 1
                continue
            empty = 0
            batch.append(ticket)
            frames = self._weight(batch)

    def _weight(self, batch: list[Ticket]) -> int:
        """How full a batch is. A frame that is cut into views fills it: others would wait for all of its tiles."""
        return sum(
            self._max_batch if ticket.lane.plan.views else 1 for ticket in batch if isinstance(ticket.item, Frame)
        )

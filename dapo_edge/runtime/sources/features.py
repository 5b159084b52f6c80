"""A camera's GenICam features by a URI's query: exposure, gain, pixel format, triggers, whatever the camera knows.

Keys that are not the source's own are features, set in the order given, because one may depend on another
(`?ExposureAuto=Off&ExposureTime=500`, or a selector before what it selects). Names: Standard Features Naming Convention
(https://www.emva.org/standards-technology/genicam).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from dapo_edge.errors import SourceRefused, did_you_mean

Trigger = Literal["off", "software", "hardware"]
Feature = tuple[str, str]  # name, value as text


class Nodes(Protocol):
    """A camera's features."""

    def names(self) -> Iterable[str]:
        """Those that can be listed, to find what a wrong name may have meant."""
        ...

    def has(self, name: str) -> bool:
        """Whether the camera knows such a feature, now available or not."""
        ...

    def get(self, name: str) -> str | None:
        """The value as text; None: the camera has no such feature, or it can't be read now."""
        ...

    def set(self, name: str, text: str) -> None:
        """Write a value, by the feature's type; a command is carried out. Raises `ValueError` with the reason."""
        ...

    def valid(self, name: str) -> str:
        """What `set` takes, in words."""
        ...


def set_features(uri: str, nodes: Nodes, features: Iterable[Feature], own: Iterable[str]) -> None:
    """Write `features` one after the other. Raises `SourceRefused` at the first that the camera refuses."""
    for name, text in features:
        if not nodes.has(name):
            hint = did_you_mean(name, [*nodes.names(), *own], cutoff=0.5)
            remedy = f"{hint}Use a feature from the camera's manual, or one of the source's own: {', '.join(own)}"
            raise SourceRefused(f"the camera of '{uri}' has no feature '{name}'", remedy)
        try:
            nodes.set(name, text)
        except ValueError as error:
            cause = f"the camera of '{uri}' refuses {name}={text} ({error})"
            raise SourceRefused(cause, f"{name} is {nodes.valid(name)}") from error


def set_trigger(uri: str, nodes: Nodes, wanted: str | None) -> Trigger:
    """Let frames come by themselves (`off`), by command (`software`) or by a line (its name); None: as it is set.

    Returns what it is now. Raises `SourceRefused`.
    """
    if wanted is not None:
        on = wanted != "off"
        if nodes.get("TriggerMode") is None:
            if on:
                remedy = "Leave out trigger=, or use a camera that can be triggered"
                raise SourceRefused(f"the camera of '{uri}' has no TriggerMode, so it can't be triggered", remedy)
            return "off"
        source = "Software" if wanted == "software" else wanted
        features = [("TriggerSelector", "FrameStart")] if nodes.get("TriggerSelector") is not None else []
        # The source first: where it is refused, the camera is not left waiting for a trigger.
        features += [("TriggerSource", source), ("TriggerMode", "On")] if on else [("TriggerMode", "Off")]
        set_features(uri, nodes, features, ())
    if nodes.get("TriggerMode") != "On":
        return "off"
    return "software" if nodes.get("TriggerSource") == "Software" else "hardware"


def frame_rate(nodes: Nodes) -> float | None:
    """Frames per second that the camera announces; None: it doesn't say."""
    for name in ("ResultingFrameRate", "ResultingFrameRateAbs", "AcquisitionResultingFrameRate"):
        rate = _number(nodes.get(name))
        if rate:
            return rate
    if nodes.get("AcquisitionFrameRateEnable") in ("0", "false"):
        return None
    return _number(nodes.get("AcquisitionFrameRate")) or _number(nodes.get("AcquisitionFrameRateAbs"))


def whole_number(nodes: Nodes, name: str) -> int | None:
    """A feature's value, where it is a number."""
    value = _number(nodes.get(name))
    return None if value is None else int(value)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def reason_of(error: Exception) -> str:
    """What a GenICam library says, without the place in its source code."""
    return re.split(r" : \w+Exception thrown", str(error))[0].strip().rstrip(".")


class GenApiNodes:
    """A node map of GenApi, the library under both genicam and pypylon, which wrap it with names of different styles.

    `errors`: the library's exceptions that mean that a value is refused.
    """

    def __init__(
        self,
        find: Callable[[str], Any],  # a node by name; None where there is none
        names: Callable[[], Iterable[str]],
        errors: tuple[type[Exception], ...],
        spell: Callable[[str], str],  # from "to_string" to the wrapper's name of the method
    ) -> None:
        self._find = find
        self._errors = errors
        self._spell = spell
        self.names = names

    def has(self, name: str) -> bool:
        """See `Nodes`."""
        return self._find(name) is not None

    def get(self, name: str) -> str | None:
        """See `Nodes`."""
        node = self._find(name)
        try:
            return None if node is None else str(self._of(node, "to_string")())
        except self._errors:
            return None

    def set(self, name: str, text: str) -> None:
        """See `Nodes`."""
        node = self._find(name)
        kind = type(node).__name__
        try:
            if "Command" in kind:
                self._of(node, "execute")()
                return
            if "Integer" in kind:
                int(text, 0)  # GenApi would take 12.5 for 12
            self._of(node, "from_string")(text)
        except ValueError:
            raise ValueError("it is no whole number") from None
        except self._errors as error:
            if type(error).__name__ == "AccessException":
                raise ValueError("it can't be written now; another feature may lock it") from error
            raise ValueError(reason_of(error)) from error

    def valid(self, name: str) -> str:
        """See `Nodes`."""
        node = self._find(name)
        kind = type(node).__name__
        if "Command" in kind:
            return "a command: write =1"
        if "Bool" in kind:
            return "0 or 1"
        if "Enum" in kind:
            return f"one of {', '.join(self._of(node, 'symbolics'))}"
        if "Integer" in kind or "Float" in kind:
            return f"a number from {self._of(node, 'min')} to {self._of(node, 'max')}"
        return "a text"

    def _of(self, node: Any, name: str) -> Any:
        return getattr(node, self._spell(name))

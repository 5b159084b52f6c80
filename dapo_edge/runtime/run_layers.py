"""What a run config is put together from: its file, then the environment, then options. Later ones win.

All functions work on plain mappings and lists and hand back mistakes as texts, so that these can be listed together
with what the schema finds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dapo_edge.sections import parse_yaml, shown, shown_key

ENVIRONMENT = "DAPO_EDGE_RUN__"
LEVEL = "__"  # between the keys in a variable's name, as the dot in --set

_VARIABLE = re.compile(r"\$?\$\{([^}]*)\}?")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


def substituted(data: Any, environment: Mapping[str, str]) -> tuple[Any, list[str]]:
    """`data` with `${NAME}` and `${NAME:-default}` in its texts replaced, and the mistakes.

    The default stands in for a variable that is not set or empty. `$${` stands for `${` itself. A text that is one
    variable and nothing else is read like the YAML that it could have been: `fps: ${FPS}` gives a number.
    """
    mistakes: list[str] = []

    def replace(text: str, where: str) -> Any:
        found = list(_VARIABLE.finditer(text))
        value = _VARIABLE.sub(lambda match: _value(match, environment, where, mistakes), text)
        is_all = len(found) == 1 and found[0][0] == text and not text.startswith("$$")
        return scalar(value) if is_all else value

    return _walk(data, "", replace), mistakes


def escaped(data: Any) -> Any:
    """`data` written so that `substituted` gives it back."""
    return _walk(data, "", lambda text, where: text.replace("${", "$${"))


def _value(match: re.Match[str], environment: Mapping[str, str], where: str, mistakes: list[str]) -> str:
    if match[0].startswith("$$"):
        return match[0][1:]
    name = _NAME.fullmatch(match[1])
    if name is None or not match[0].endswith("}"):
        mistakes.append(
            f"'{where}' holds '${{' without a name: write ${{NAME}}, ${{NAME:-default}}, or $${{ for itself"
        )
    elif name[2] is not None:
        return environment.get(name[1]) or name[2]
    elif name[1] in environment:
        return environment[name[1]]
    else:
        mistakes.append(f"'{where}' needs the environment variable {name[1]}, which is not set")
    return match[0]


def _walk(data: Any, where: str, change: Callable[[str, str], Any]) -> Any:
    if isinstance(data, str):
        return change(data, where)
    if isinstance(data, Mapping):
        return {key: _walk(value, f"{where}.{shown_key(key)}".lstrip("."), change) for key, value in data.items()}
    if isinstance(data, list):
        return [_walk(value, f"{where}.{index}", change) for index, value in enumerate(data)]
    return data


def from_environment(environment: Mapping[str, str]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """What variables such as DAPO_EDGE_RUN__SOURCES__0__FPS set: variable -> (keys, value). Empty ones set nothing."""
    found = {
        variable: (tuple(variable[len(ENVIRONMENT) :].lower().split(LEVEL)), scalar(text))
        for variable, text in environment.items()
        if variable.startswith(ENVIRONMENT) and text
    }
    in_order = sorted(found, key=lambda variable: [(key.zfill(9), key) for key in found[variable][0]])
    return {variable: found[variable] for variable in in_order}


def from_settings(settings: Sequence[str]) -> tuple[dict[str, tuple[tuple[str, ...], Any]], list[str]]:
    """What texts such as `sources.0.fps=10` set: text -> (keys, value), and the mistakes."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    mistakes = []
    for text in settings:
        keys, equals, value = text.partition("=")
        if equals and all(keys.split(".")):
            found[f"--set {_place(keys.split('.'))}"] = tuple(keys.split(".")), scalar(value)
        else:
            mistakes.append(f"'--set {_place(keys.split('.')):.40}' sets nothing: write it like sources.0.fps=10")
    return found, mistakes


def changed(
    data: dict[str, Any], changes: Mapping[str, tuple[Sequence[str], Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of `data` with every change made that can be, and what is wrong with the others."""
    data = copy.deepcopy(data)
    mistakes = {}
    for origin, (keys, value) in changes.items():
        try:
            _put(data, keys, value)
        except LookupError as error:
            mistakes[origin] = str(error.args[0])
    return data, mistakes


def scalar(text: str) -> Any:
    """A text as YAML understands it; what is no YAML stands for itself."""
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _put(data: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    place: Any = data
    for number, key in enumerate(keys[:-1]):
        inner = _get(place, key, keys[: number + 1])
        if inner is None:
            inner = [] if keys[number + 1].isdecimal() else {}
            _set(place, key, inner, keys[: number + 1])
        place = inner
    _set(place, keys[-1], value, keys)


def _get(place: Any, key: str, so_far: Sequence[str]) -> Any:
    if isinstance(place, dict):
        return place.get(key)
    index = _index(place, key, so_far)
    return place[index] if index < len(place) else None


def _set(place: Any, key: str, value: Any, so_far: Sequence[str]) -> None:
    if isinstance(place, dict):
        place[key] = value
        return
    index = _index(place, key, so_far)
    place[index : index + 1] = [value]


def _index(place: Any, key: str, so_far: Sequence[str]) -> int:
    """The place of an item in a list: of one that is there, or of the next one."""
    parent = _place(so_far[:-1])
    if not isinstance(place, list):
        raise LookupError(f"'{parent}' is {shown(place):.40}, which has no '{shown_key(key)}'")
    if not key.isdecimal():
        raise LookupError(f"'{parent}' is a list; '{shown_key(key)}' is no place in it, which counts from 0")
    if int(key) > len(place):
        raise LookupError(f"'{parent}' has {len(place)} items, so there is no '{key}', counted from 0")
    return int(key)


def _place(keys: Sequence[str]) -> str:
    """Keys in a message."""
    return ".".join(map(shown_key, keys))

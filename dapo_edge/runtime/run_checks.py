"""What concerns several parts of a run config at once: names, paths, and that no result replaces what is read.

The data may be anything that YAML can hold; what has the wrong type is left to the schema's check.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dapo_edge.data.pictures import IMAGE_EXTENSIONS
from dapo_edge.errors import SourceError
from dapo_edge.outputs.recorder import names_pictures
from dapo_edge.runtime.sources.uri import path_of, redact, split
from dapo_edge.sections import shown

MOST_ITEMS = 256  # sources, or sinks: each of these is compared with each of those
FILE_SCHEMES = ("dir", "file", "image")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # in a path, an address has lost one of its two slashes

Item = dict[str, Any]


def is_address(path: str | Path) -> bool:
    """Whether what should be a path is the address of a camera, or the like."""
    return bool(_ADDRESS.match(str(path)))


def with_paths(data: Item, folder: Path) -> Item:
    """A copy of `data` whose relative paths are made absolute, as seen from `folder`."""

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or not value or is_address(value):
            return value
        return str(folder / os.path.expanduser(value))  # noqa: PTH111 (knows no errors)

    def resolved(item: Item, key: str) -> Item:
        return {**item, key: absolute(item[key])} if key in item else item

    data = _each(data, "sources", lambda number, item: resolved(item, "uri"))
    return resolved(_each(data, "sinks", lambda number, item: resolved(item, "path")), "package")


def named(data: Item) -> Item:
    """A copy of `data` in which every source and sink has a name: camera1, camera2, jsonl, jsonl2, ..."""
    kinds: Counter[str] = Counter()

    def filled(item: Item, name: str) -> Item:
        return item if item.get("name") is not None else {**item, "name": name}

    def sink(number: int, item: Item) -> Item:
        kind = str(item.get("kind"))
        kinds[kind] += 1
        return filled(item, kind if kinds[kind] == 1 else f"{kind}{kinds[kind]}")

    return _each(_each(data, "sources", lambda number, item: filled(item, f"camera{number + 1}")), "sinks", sink)


def repeated_names(data: Item) -> list[str]:
    """Mistakes: names that two sources, or two sinks, have in common, be it on a disk that knows no capitals."""
    mistakes = []
    for key in ("sources", "sinks"):
        first: dict[str, tuple[int, str]] = {}
        for number, item in _items(data, key):
            name = str(item.get("name"))
            other, its_name = first.setdefault(name.casefold(), (number, name))
            if other != number:
                so_is = "so is that of" if name == its_name else "only capitals differ from the name of"
                mistakes.append(f"'{key}.{number}.name' is {shown(name)}: {so_is} {key}.{other}")
    return mistakes


def misplaced_package(data: Item) -> list[str]:
    """The mistake of naming an address where the package is needed."""
    package = data.get("package")
    if not isinstance(package, str) or not is_address(package):
        return []
    return [f"'package' is {shown(package)}: an address, where a path is needed"]


def misplaced_outputs(data: Item) -> list[str]:
    """Mistakes: sinks that write where a source or another sink is, or to no path at all."""
    mistakes = []
    first: dict[Path | None, int] = {}
    for number, item in _items(data, "sinks"):
        where, path = f"'sinks.{number}.path'", item.get("path")
        if isinstance(path, str) and is_address(path):
            mistakes.append(f"{where} is {shown(path)}: an address, where a path is needed")
            continue
        if not isinstance(path, str) and (path is not None or item.get("kind") != "jsonl"):
            continue
        target = None if path is None else Path(os.path.realpath(path))
        if target in first:
            mistakes.append(f"{where} is {path or 'stdout'}: so is that of sinks.{first[target]}")
        first.setdefault(target, number)
        for _, source in _items(data, "sources"):
            uri = source.get("uri")
            if target is not None and isinstance(uri, str) and replaces(target, uri):
                mistakes.append(f"{where} is '{path}': where the source '{redact(uri)}' lies")
    return mistakes


def replaces(out: Path, uri: str) -> bool:
    """Whether results at `out` would lie among the files of a source, and might replace them."""
    read = path_of_source(uri)
    if read is None:
        return False
    target = Path(os.path.realpath(out))
    is_pictures = read.is_dir() or read.suffix.lower() in IMAGE_EXTENSIONS
    written = target.parent if names_pictures(target) else target
    pictures = read if read.is_dir() else read.parent
    return target == read or (is_pictures and target.suffix.lower() != ".mp4" and written == pictures)


def path_of_source(uri: str) -> Path | None:
    """The file or folder that a source reads; None when it reads none."""
    address = split(uri)
    if address is None:
        return Path(os.path.realpath(uri))
    if address.scheme not in FILE_SCHEMES:
        return None
    try:
        return Path(os.path.realpath(path_of(address.body)))
    except SourceError:
        return None


def _items(data: Item, key: str) -> Iterator[tuple[int, Item]]:
    """The mappings in a list that may be in it, with their places."""
    items = data.get(key)
    if isinstance(items, list):
        yield from ((number, item) for number, item in enumerate(items[:MOST_ITEMS]) if isinstance(item, dict))


def _each(data: Item, key: str, change: Callable[[int, Item], Item]) -> Item:
    """A copy of `data` with every mapping in one of its lists changed."""
    if not isinstance(data.get(key), list):
        return data
    changes = {number: change(number, item) for number, item in _items(data, key)}
    return {**data, key: [changes.get(number, item) for number, item in enumerate(data[key])]}

"""The bench document on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dapo_edge.bench import words
from dapo_edge.tables import stage_table


def bench_table(result: Mapping[str, Any]) -> Group:
    """What `dapo-edge bench` prints for people; all of it, and more, is in the document."""
    parts: list[RenderableType] = [Text(words.title(result), "bold"), *map(Text, words.setting(result))]
    if result["interrupted"]:
        parts.append(Text("interrupted: of a part of the run", "bold red"))
    parts += [Text(), stage_table(result["stages"]), Text(), Text(words.speed(result), "bold")]
    verdict = words.deadline(result)
    if verdict is not None:
        parts.append(Text(verdict, "bold green" if result["deadline"]["met"] else "bold red"))
    told = (words.rate(result), words.found_rate(result), words.comparison(result))
    parts += [Text(line) for line in told if line is not None]
    parts += _tables(result)
    parts += [Text(), Text("; ".join(f"{name}: {text}" for name, text in words.machine(result).items()), "dim")]
    parts += [Text(f"warning: {warning}", "yellow") for warning in result["warnings"]]
    return Group(*parts)


def _tables(result: Mapping[str, Any]) -> list[RenderableType]:
    search, sweeps, other = result["find_rate"], result["sweeps"], result["compare"]
    found: list[RenderableType] = []
    if other is not None:
        found += [Text(), Text(f"{words.title(other)}, on the same frames", "bold"), stage_table(other["stages"])]
    if search is not None:
        found += [Text(), _table(words.rows(words.PROBES, search["probes"]))]
    if sweeps["batches"]:
        found += [Text(), _table(words.rows(words.BATCHES, sweeps["batches"]))]
    if sweeps["cameras"]:
        found += [Text(), _table(words.rows(words.CAMERAS, sweeps["cameras"]))]
    return found


def _table(rows: words.Rows) -> Table:
    table = Table(*rows.columns, box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for cells in rows.cells:
        table.add_row(*cells)
    return table

"""Sections of YAML files, checked strictly: unknown keys and wrong types stop with the nearest valid name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dapo_edge.errors import RecipeError, did_you_mean

MAX_BYTES = 1_000_000


class Section(BaseModel):
    """Base of every part of a recipe: no unknown key, no value that only looks like the right type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a recipe's file. Raises `RecipeError`."""
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"the recipe '{path}' is not a file", "Give a recipe in YAML")
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"the recipe '{path}' is larger than {MAX_BYTES} bytes", "Give a recipe in YAML")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the recipe '{path}' can't be read ({error.strerror})", "Check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"'{path}' is not a text file", "Give a recipe in YAML, UTF-8 encoded") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"the recipe '{path}' is not valid YAML: {reason}", "Mend the named line") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"the recipe '{path}' holds no keys", "Start from the demo recipe: dapo-edge build --print-demo-recipe"
        )
    return data


def parse_section(model: type[Section], data: dict[str, Any], origin: str) -> Any:
    """Check a mapping against any section; `origin` starts the error's text."""
    try:
        # As JSON, strict types still take a list for a tuple and a text for a path.
        return model.model_validate_json(_as_json(data, origin))
    except ValidationError as error:
        found = [dict(item) for item in error.errors(include_url=False)]
        mistakes = [_describe(model, item) for item in found if not _is_echo(item)]
        raise RecipeError(
            f"{origin}: {'; '.join(dict.fromkeys(mistakes))}", "See the valid keys: dapo-edge build --schema"
        ) from error


def _as_json(data: dict[str, Any], origin: str) -> str:
    def path_as_text(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{type(value).__name__} has no place in it")

    try:
        return json.dumps(data, default=path_as_text)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it contains itself" if "ircular" in str(error) or isinstance(error, RecursionError) else error
        raise RecipeError(f"{origin} can't be read: {reason}", "Use only texts, numbers, lists and keys") from error


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a key stands once, a date is text, and 1e-2 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (an attribute of the base class)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge")
        ]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(sorted(twice))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _is_echo(item: dict[str, Any]) -> bool:
    """Whether a list only counts as too short because an item, named by itself, was refused."""
    return item["type"] == "too_short" and len(item["input"]) > item["ctx"]["actual_length"]


def _describe(model: type[BaseModel], item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"] if "[" not in str(part))  # pydantic names union members there
    if item["type"] == "extra_forbidden":
        valid = sorted(_fields_at(model, item["loc"][:-1]))
        hint = did_you_mean(str(item["loc"][-1]), valid).strip() or f"Valid keys are {', '.join(valid)}"
        return f"unknown key '{where}' ({hint[0].lower()}{hint[1:]})"
    if item["type"] == "missing":
        return f"the key '{where}' is missing"
    text = item["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return f"'{where}' is {item['input']!r:.60}: {text[0].lower()}{text[1:]}" if where else text


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        model = (field and _section_in(field.annotation)) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation names, be it the item of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)

"""Sections of YAML files, checked strictly: unknown keys and wrong types stop with the nearest valid name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dapo_edge.errors import RecipeError, did_you_mean

MAX_BYTES = 1_000_000
MAX_VALUES, MAX_LEVELS = 50_000, 100  # of a file, with everything in the place of every *alias
MOST_MISTAKES = 50  # in one message
RECIPE_SCHEMA = "dapo-edge build --schema"


class Section(BaseModel):
    """Base of every part of a recipe: no unknown key, no value that only looks like the right type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def read_yaml(
    path: Path,
    what: str = "recipe",
    start: str = "Start from the demo recipe: dapo-edge build --print-demo-recipe",
) -> dict[str, Any]:
    """The keys of a YAML file. Raises `RecipeError`, which calls it `what` and says how to `start` one."""
    remedy = f"Give a {what} in YAML"
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"the {what} '{path}' is not a file", remedy)
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"the {what} '{path}' is larger than {MAX_BYTES} bytes", remedy)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the {what} '{path}' can't be read ({error.strerror})", "Check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"'{path}' is not a text file", f"{remedy}, UTF-8 encoded") from error
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"the {what} '{path}' is not valid YAML: {error}", "Mend the named line") from error
    if not isinstance(data, dict):
        raise RecipeError(f"the {what} '{path}' holds no keys", start)
    return data


def parse_yaml(text: str) -> Any:
    """What a YAML text means, be it a single value. Raises `ValueError`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(_explained(error)) from None  # its own text quotes the line, which may hold a password


def parse_section(
    model: type[Section], data: dict[str, Any], origin: str, *, schema: str = RECIPE_SCHEMA, also: Sequence[str] = ()
) -> Any:
    """Check a mapping against any section. Raises one `RecipeError` for all mistakes.

    `origin` starts the error's text, `schema` is the command that lists the valid keys, and `also` are mistakes that
    were found before, by somebody who looks at several sections at once.
    """
    section = None
    mistakes = list(also)
    try:
        # As JSON, strict types still take a list for a tuple and a text for a path.
        section = model.model_validate_json(_as_json(data, origin))
    except ValidationError as error:
        found = [dict(item) for item in error.errors(include_url=False)]
        found = [item for item in found if not _is_echo(item)]
        mistakes += [_describe(model, data, item) for item in found[:MOST_MISTAKES]]
        if len(found) > MOST_MISTAKES:
            mistakes.append(f"and {len(found) - MOST_MISTAKES} more")
    if mistakes:
        from dapo_edge.runtime.sources.uri import redact_message

        cause = redact_message(f"{origin}: {'; '.join(dict.fromkeys(mistakes))}")
        raise RecipeError(cause, f"See the valid keys: {schema}")
    return section


def _as_json(data: dict[str, Any], origin: str) -> str:
    def path_as_text(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{type(value).__name__} has no place in it")

    try:
        text = json.dumps(data, default=path_as_text, ensure_ascii=False)
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise RecipeError(f"{origin}: a name in it is not text in UTF-8", "Rename the file") from error
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it contains itself" if "ircular" in str(error) or isinstance(error, RecursionError) else error
        raise RecipeError(f"{origin} can't be read: {reason}", "Use only texts, numbers, lists and keys") from error


@dataclass
class _Extent:
    """How large a part of a file is: values and keys, and levels of lists and mappings in each other."""

    values: int = 1
    levels: int = 1

    def add(self, inner: _Extent) -> None:
        self.values += inner.values
        self.levels = max(self.levels, 1 + inner.levels)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a key stands once, a date is text, 1e-2 is a number, and an alias makes no bomb."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (an attribute of the base class)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._extents: dict[yaml.Node | None, _Extent] = {}  # of all that is complete
        self._begun: list[_Extent] = [_Extent()]  # from the outermost to the innermost

    def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
        """The next node, unless the file would be too large with it."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            extent = self._extents.get(node)
            if extent is None:
                raise yaml.composer.ComposerError(None, None, "it contains itself", mark)
        else:
            self._begun.append(_Extent())
            if len(self._begun) > MAX_LEVELS:
                raise yaml.composer.ComposerError(None, None, "it is nested too deeply", mark)
            node = super().compose_node(parent, index)
            extent = self._extents[node] = self._begun.pop()
        outer = self._begun[-1]
        outer.add(extent)
        if outer.values > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"it stands for more than {MAX_VALUES} values", mark)
        if outer.levels > MAX_LEVELS:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(
            key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge")
        )
        twice = {key for key, count in keys.items() if count > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(map(shown_key, sorted(twice)))} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _explained(error: yaml.YAMLError) -> str:
    """What is wrong and where, without a word of the text itself, be it quoted by PyYAML."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1} is not allowed in YAML"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__  # PyYAML has no others today
    quotes = r" ?(?:'(?!<[a-z ]+>')[^']{2,}'|\"[^\"]{2,}\")"  # of the text; '<stream end>' and ':' are none
    problem, mark = re.sub(quotes, "", error.problem or ""), error.problem_mark
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


def _is_echo(item: dict[str, Any]) -> bool:
    """Whether a list only counts as too short because an item, named by itself, was refused."""
    return item["type"] == "too_short" and len(item["input"]) > item["ctx"]["actual_length"]


def _describe(model: type[BaseModel], data: Any, item: dict[str, Any]) -> str:
    where = _path(data, item["loc"])
    if item["type"] == "extra_forbidden":
        valid = sorted(_fields_at(model, item["loc"][:-1]))
        hint = did_you_mean(str(item["loc"][-1]), valid).strip() or f"Valid keys are {', '.join(valid)}"
        return f"unknown key '{where}' ({hint[0].lower()}{hint[1:]})"
    if item["type"] == "missing":
        return f"the key '{where}' is missing"
    if item["type"].startswith("union_tag_"):
        return _describe_tag(where, item["ctx"])
    text = item["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return f"'{where}' is {shown(item['input']):.60}: {text[0].lower()}{text[1:]}" if where else text


def _describe_tag(where: str, context: dict[str, Any]) -> str:
    """The key that says which of several sections is meant is missing, or says something else."""
    where = ".".join(filter(None, (where, context["discriminator"].strip("'"))))
    if "tag" not in context:
        return f"the key '{where}' is missing"
    valid = [name.strip(" '") for name in context["expected_tags"].split(",")]
    hint = did_you_mean(context["tag"], valid)
    return f"'{where}' is {shown(context['tag']):.60}: {hint}Valid are {', '.join(valid)}"


def shown(value: Any) -> str:
    """A value as Python writes it, without the passwords of the addresses in it."""
    return repr(_without_passwords(value))


def shown_key(key: Any) -> str:
    """A key of a mapping in a message. What is no name may be a part of an address, as `rtsp://me:my: word@host` is."""
    return "***" if re.search("[:@=]", str(key)) else str(key)


def _without_passwords(value: Any) -> Any:
    from dapo_edge.runtime.sources.uri import redact

    if isinstance(value, str):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_without_passwords(item) for item in value]
    if isinstance(value, dict):
        keys = {key: shown_key(key) if isinstance(key, str) else key for key in value}
        return {keys[key]: "***" if keys[key] == "***" else _without_passwords(item) for key, item in value.items()}
    return value


def _path(data: Any, location: tuple[Any, ...]) -> str:
    """The keys that lead to a mistake, without the names of union members that pydantic puts between them."""
    parts: list[str] = []
    for number, part in enumerate(location):
        if isinstance(data, dict) and (part in data or number == len(location) - 1):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        if "[" not in str(part):
            parts.append(shown_key(part))
    return ".".join(parts)


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The valid keys where `location` leads; a part of it may be the tag that chooses one of several sections."""
    sections = [model]
    for part in location:
        chosen = [section for section in sections if part in _tags(section)]
        inner = [s for section in sections if part in section.model_fields for s in _sections_of(section, part)]
        sections = chosen or inner or sections
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _tags(section: type[BaseModel]) -> set[Any]:
    """What the section's own discriminator is."""
    fields = [field.annotation for field in section.model_fields.values() if field.is_required()]
    return {value for annotation in fields if get_origin(annotation) is Literal for value in get_args(annotation)}


def _sections_of(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    return list(_sections_in(section.model_fields[key].annotation))


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names, be they items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)

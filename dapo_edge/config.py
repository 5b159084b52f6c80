"""Recipes: what to build, as a YAML file. Unknown keys and wrong types stop with the nearest valid name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dapo_edge.errors import RecipeError, did_you_mean
from dapo_edge.kernels.map_spec import MAX_MAP_SIDE_PX, MapSize, ScoreRule
from dapo_edge.structures import NORMAL

Precision = Literal["fp32", "fp16"]
MAX_RECIPE_BYTES = 1_000_000
SYNTHETIC = "synthetic"  # as it is, or the address of a belt
ASSETS = Path(__file__).parent / "assets"  # tuned prompts that come with the package go by their file name alone
MAX_DEFECT_TYPES = 254  # a type map stores a channel index in 8 bits


class Section(BaseModel):
    """Base of every part of a recipe: no unknown key, no value that only looks like the right type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Backbone(Section):
    """Which CLIP sees and reads."""

    model: str = Field(description="an open_clip model name, a bundled one (surface-tiny), or a model config (.json)")
    pretrained: str | None = Field(
        None, min_length=1, description="open_clip's tag of the weights, e.g. openai; null = seeded weights"
    )
    checkpoint: Path | None = Field(None, description="a local weights file instead of a pretrained tag")

    @model_validator(mode="after")
    def _one_origin(self) -> Backbone:
        if self.pretrained and self.checkpoint:
            raise ValueError("give either 'pretrained' or 'checkpoint', not both")
        return self


def _checked_words(text: str) -> str:
    """Words that a prompt may hold, with single spaces."""
    text = " ".join(text.split())
    if not text:
        raise ValueError("it holds no word")
    if not text.isprintable():
        raise ValueError("it holds characters that can't be printed")
    if "<" in text:  # <end_of_text> and its like are read as tokens, and move the place where the text is read
        raise ValueError("words can't contain '<'")
    return text


def check_words(text: str) -> None:
    """Raise `RecipeError` for what can't be the name of a defect type."""
    try:
        _checked_words(text)
    except ValueError as error:
        raise RecipeError(f"{text!r} can't be a defect word: {error}", "Rename the folder or label") from error


class DefectType(Section):
    """One defect type: the name that results carry and the words that the text encoder reads."""

    name: Annotated[str, AfterValidator(_checked_words)] = Field(min_length=1)
    phrase: Annotated[str, AfterValidator(_checked_words)] = Field(min_length=1)


def _named_phrase(item: Any) -> Any:
    """Accept `scratch` and `{glue: dried glue strip}` beside the full form."""
    if isinstance(item, str):
        return {"name": item, "phrase": item}
    if isinstance(item, dict) and len(item) == 1 and not item.keys() & {"name", "phrase"}:
        (name, phrase), *_ = item.items()
        return {"name": name, "phrase": phrase}
    return item


class Prompts(Section):
    """The words of the prompt bank, and the tuned tokens around them."""

    defects: tuple[Annotated[DefectType, BeforeValidator(_named_phrase)], ...] = Field(
        min_length=1, max_length=MAX_DEFECT_TYPES, description="words, or name: phrase pairs"
    )
    object: Annotated[str, AfterValidator(_checked_words)] = Field(
        "object", min_length=1, description="the noun that every prompt ends with"
    )
    tuned: Path | None = Field(
        None, description="tuned tokens and adapters: .safetensors, a released .pth, or a bundled name"
    )
    readout: Literal["eot", "release"] | None = Field(
        None, description="where the text vector is read; null = as the tuned file says, else eot"
    )

    @field_validator("defects")
    @classmethod
    def _distinct(cls, defects: tuple[DefectType, ...]) -> tuple[DefectType, ...]:
        names = [defect.name for defect in defects]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"defect names must differ; given twice: {', '.join(twice)}")
        phrases = [defect.phrase for defect in defects]
        same = sorted({phrase for phrase in phrases if phrases.count(phrase) > 1})
        if same:
            raise ValueError(f"two names have the words '{same[0]}': nothing could tell them apart")
        if NORMAL in names:
            raise ValueError(f"'{NORMAL}' is the name of the bank's first row; call the defect something else")
        return defects


class Map(Section):
    """From patch probabilities to the defect map."""

    size: MapSize = Field("model", description="model = image size, frame = the camera's size, or [width, height]")
    smoothing_px: float = Field(
        4.0, ge=0, le=64, description="Gaussian sigma in pixels at the model's image size; 0 = the released DAPO"
    )
    score: ScoreRule = Field("image", description="image score: image embedding, map maximum, or mean of the top 1 %")

    @field_validator("size")
    @classmethod
    def _possible_size(cls, size: MapSize) -> MapSize:
        if not isinstance(size, str) and not all(1 <= side <= MAX_MAP_SIDE_PX for side in size):
            raise ValueError(f"width and height must lie in 1..{MAX_MAP_SIDE_PX}")
        return size


class Thresholds(Section):
    """Where the good parts end. Without frames the package stays uncalibrated and every verdict is 'unsure'."""

    frames: str | None = Field(
        None, min_length=1, description="folder of good parts, 'synthetic', synthetic://..., or null = not calibrated"
    )
    count: int = Field(64, ge=8, le=100_000, description="how many frames at most")
    false_reject_rate: float = Field(0.01, gt=0, lt=0.5, description="share of good parts that may be rejected")


class Gate(Section):
    """How far the compiled encoder may be from eager torch before the build fails (exit code 4)."""

    frames: str = Field("synthetic", min_length=1, description="folder of frames, 'synthetic', or synthetic://...")
    count: int = Field(8, ge=1, le=10_000)
    max_map_difference: float = Field(0.02, gt=0, le=1, description="largest difference of any map pixel")
    max_score_difference: float = Field(0.02, gt=0, le=1, description="largest difference of any image score")
    max_flips: float = Field(0.005, ge=0, le=1, description="share of frames whose verdict may differ")


LayoutName = Literal["folder", "csv", "mvtec_ad", "visa", "mpdd", "mad", "real_iad"]
Part = Literal["context", "text_tokens", "visual_tokens", "adapters"]
PARTS: tuple[Part, ...] = ("context", "text_tokens", "visual_tokens", "adapters")


class Stage(Section):
    """One stretch of tuning: which parts learn, and for how long."""

    learn: tuple[Part, ...] = Field(PARTS, min_length=1, description="parts that learn; the others stay as they are")
    epochs: int = Field(5, ge=1, le=10_000)
    learning_rate: float = Field(1e-3, gt=0, le=1)

    @field_validator("learn")
    @classmethod
    def _distinct(cls, learn: tuple[Part, ...]) -> tuple[Part, ...]:
        if len(set(learn)) < len(learn):
            raise ValueError("a part is named twice")
        return learn


class TuningPlan(Section):
    """How `dapo-edge tune` learns from labelled pictures; `build` does not look at it."""

    data: str = Field("synthetic", min_length=1, description="folder of a data set, or 'synthetic'")
    layout: LayoutName = Field("folder", description="how the data set lies on disk")
    categories: tuple[str, ...] | None = Field(None, min_length=1, description="of the data set, to use; null = all")
    images: int = Field(2000, ge=8, description="synthetic only: pictures to draw")
    validation: float = Field(0.15, gt=0, lt=0.9, description="share of the pictures that choose the best epoch")
    stages: tuple[Stage, ...] = Field((Stage(),), min_length=1)
    batch: int = Field(8, ge=1, le=4096)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 = mixed precision in the encoder")
    loss_px: int | None = Field(
        None, ge=8, le=4096, description="side of the maps that the loss looks at; null = the model's image size"
    )
    seed: int = Field(0, ge=0, lt=2**31)

    @field_validator("data")
    @classmethod
    def _no_belt(cls, data: str) -> str:
        if data.startswith(f"{SYNTHETIC}://"):
            raise ValueError("a belt has no numbered pictures to learn from; use 'synthetic' or a folder")
        return data


class Recipe(Section):
    """Everything that `dapo-edge build` needs to make an engine package, and `dapo-edge tune` to learn its prompts."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="name of the package: letters, digits, . _ -",
    )
    method: str = Field("dapo", description="how prompts and maps are made")
    backbone: Backbone
    image_size: int | None = Field(
        None, ge=16, le=4096, description="side of the model's input in px; null = the model's"
    )
    feature_layers: tuple[int, ...] | None = Field(
        None, description="blocks that are tapped, from 1; null = four evenly"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the method; dapo: groups, context_tokens, text_depth, text_tokens, visual_tokens, "
        "temperature",
    )
    prompts: Prompts
    map: Map = Map()
    precision: Precision = Field("fp32", description="fp16 on a CPU means its fastest float type")
    batch: int = Field(1, ge=1, le=32, description="views per engine call")
    thresholds: Thresholds = Thresholds()
    gate: Gate = Gate()
    tuning: TuningPlan = TuningPlan()
    seed: int = Field(0, ge=0, lt=2**32)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; files that it names are taken relative to its folder. Raises `RecipeError`."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"the recipe '{path}' is not a file", "Give a recipe in YAML")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"the recipe '{path}' is larger than {MAX_RECIPE_BYTES} bytes", "Give a recipe in YAML")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the recipe '{path}' can't be read ({error.strerror})", "Check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"'{path}' is not a text file", "Give a recipe in YAML, UTF-8 encoded") from error
    try:
        data = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"the recipe '{path}' is not valid YAML: {reason}", "Mend the named line") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"the recipe '{path}' holds no keys", "Start from the demo recipe: dapo-edge build --print-demo-recipe"
        )
    return resolve_paths(parse_recipe(data, origin=str(path)), path.resolve().parent)


_OPTIONAL = ("options", "map", "thresholds", "gate", "tuning")


def parse_recipe(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check a mapping against the recipe's schema. Raises `RecipeError` naming every mistake."""
    emptied = [key for key, value in data.items() if value is None and key in _OPTIONAL]
    return parse_section(Recipe, {key: value for key, value in data.items() if key not in emptied}, origin)


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


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make the file names in a recipe absolute, relative to `folder`."""

    def absolute(value: Any) -> Any:
        return None if value is None else str(folder / os.path.expanduser(value))  # noqa: PTH111 (knows no errors)

    def frames(value: str | None) -> str | None:
        is_generated = value is not None and (value == SYNTHETIC or value.startswith(f"{SYNTHETIC}://"))
        return value if is_generated else absolute(value)

    data = recipe.model_dump(mode="json")
    backbone, prompts = data["backbone"], data["prompts"]
    backbone["checkpoint"] = absolute(backbone["checkpoint"])
    if backbone["model"].endswith(".json"):
        backbone["model"] = absolute(backbone["model"])
    prompts["tuned"] = _or_bundled(absolute(prompts["tuned"]))
    for section in ("thresholds", "gate"):
        data[section]["frames"] = frames(data[section]["frames"])
    data["tuning"]["data"] = frames(data["tuning"]["data"])
    return parse_recipe(data)


def packaged_recipe(data: dict[str, Any]) -> Recipe:
    """The recipe that a package carries; a bundled file that it names is taken from this installation."""
    recipe = parse_recipe(data)
    tuned = _or_bundled(recipe.prompts.tuned)
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"tuned": tuned and Path(tuned)})})


def _or_bundled(path: str | Path | None) -> str | Path | None:
    """A path, or the bundled file of its name where it does not exist."""
    if path is None or os.path.exists(path):  # noqa: PTH110 (knows no errors)
        return path
    bundled = ASSETS / Path(path).name
    return str(bundled) if bundled.is_file() else path


def recipe_schema() -> str:
    """JSON schema of a recipe, every key described."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


class _RecipeLoader(yaml.SafeLoader):
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


_RecipeLoader.add_implicit_resolver(
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


_ITEMS: dict[int | str, type[BaseModel]] = {"defects": DefectType, "stages": Stage}  # of the lists in a recipe


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
        elif part in _ITEMS:
            model = _ITEMS[str(part)]
    return list(model.model_fields)

"""Recipes: what to build, as a YAML file. Unknown keys and wrong types stop with the nearest valid name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from dapo_edge.errors import RecipeError
from dapo_edge.kernels.map_spec import MAX_MAP_SIDE_PX, MapSize, ScoreRule
from dapo_edge.sections import Section, parse_section, read_yaml
from dapo_edge.structures import NORMAL

Precision = Literal["fp32", "fp16", "int8", "auto"]
Estimator = Literal["max", "percentile", "entropy", "mse"]
SYNTHETIC = "synthetic"  # as it is, or the address of a belt
ASSETS = Path(__file__).parent / "assets"  # tuned prompts that come with the package go by their file name alone
MAX_DEFECT_TYPES = 254  # a type map stores a channel index in 8 bits


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


class Calibration(Section):
    """The frames whose activations decide about INT8 scales, and how. Only for precision int8 and auto."""

    frames: str | None = Field(
        None,
        min_length=1,
        description="the line's own frames: folder, video, 'synthetic' or synthetic://...; needed for int8 and auto",
    )
    count: int = Field(300, ge=8, le=10_000, description="frames at most; of more, a diverse subset is picked")
    ranges: Path | None = Field(
        None,
        description="what dapo-edge calibrate wrote (.ranges.json): then few frames are looked at in a build",
    )
    estimator: Literal["auto", Estimator] = Field(
        "auto", description="how a range is chosen from what was seen; auto = whichever changes the maps least"
    )
    migration: Literal["auto"] | float = Field(
        "auto",
        description="how far outliers move from activations into weights, 0 = not at all to 1 = wholly; auto = "
        "whichever changes the maps least",
    )
    keep: tuple[str, ...] = Field(
        (), description="blocks or Linears that stay in float: block3, block3.fc1 (qkv, out, fc1, fc2)"
    )

    @field_validator("migration")
    @classmethod
    def _share(cls, migration: str | float) -> str | float:
        if not isinstance(migration, str) and not 0 <= migration <= 1:
            raise ValueError("it must lie in 0..1, or be auto")
        return migration


LayoutName = Literal["folder", "csv", "mvtec_ad", "visa", "mpdd", "mad", "real_iad"]


class Gate(Section):
    """How far the compiled encoder may be from eager torch before the build fails (exit code 4)."""

    frames: str = Field(
        "synthetic", min_length=1, description="folder of frames or of a data set, 'synthetic', or synthetic://..."
    )
    layout: LayoutName | None = Field(
        None, description="how the data set under 'frames' lies on disk; null = a plain folder without labels"
    )
    count: int | None = Field(
        None, ge=1, le=2_000, description="how many frames; null = 8 in a float precision, 200 for int8 and auto"
    )
    max_map_difference: float | None = Field(
        None,
        gt=0,
        le=1,
        description="largest difference of any map pixel; null = 0.1 in a float precision, 0.3 in int8",
    )
    max_mean_map_difference: float = Field(0.005, gt=0, le=1, description="mean over all pixels of all frames")
    min_type_agreement: float = Field(0.98, ge=0, le=1, description="share of pixels that must have the same type")
    max_score_difference: float | None = Field(
        None,
        gt=0,
        le=1,
        description="largest difference of any image score; null = 0.1 in a float precision, 0.2 in int8",
    )
    max_flips: float = Field(0.005, ge=0, le=1, description="share of frames whose verdict may differ")
    max_auroc_drop: float = Field(
        0.005, ge=0, le=1, description="of image AUROC and pixel AUROC, where the frames have labels"
    )
    max_aupro_drop: float = Field(0.01, ge=0, le=1, description="of AUPRO, where the frames have labels")


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
    precision: Precision = Field(
        "fp32",
        description="fp16 on a CPU means its fastest float type; auto = the fastest here that passes the gate",
    )
    calibration: Calibration = Calibration()
    batch: int = Field(1, ge=1, le=32, description="views per engine call")
    thresholds: Thresholds = Thresholds()
    gate: Gate = Gate()
    tuning: TuningPlan = TuningPlan()
    seed: int = Field(0, ge=0, lt=2**32)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; files that it names are taken relative to its folder. Raises `RecipeError`."""
    path = Path(path)
    return resolve_paths(parse_recipe(read_yaml(path), origin=str(path)), path.resolve().parent)


_OPTIONAL = ("options", "map", "calibration", "thresholds", "gate", "tuning")


def parse_recipe(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check a mapping against the recipe's schema. Raises `RecipeError` naming every mistake."""
    emptied = [key for key, value in data.items() if value is None and key in _OPTIONAL]
    return parse_section(Recipe, {key: value for key, value in data.items() if key not in emptied}, origin)


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make the file names in a recipe absolute, relative to `folder`."""

    def absolute(value: Any) -> Any:
        return None if value is None else str(folder / os.path.expanduser(value))  # noqa: PTH111 (knows no errors)

    def frames(value: str | None) -> str | None:
        is_no_path = value is not None and (value == SYNTHETIC or "://" in value)
        return value if is_no_path else absolute(value)

    data = recipe.model_dump(mode="json")
    backbone, prompts = data["backbone"], data["prompts"]
    backbone["checkpoint"] = absolute(backbone["checkpoint"])
    if backbone["model"].endswith(".json"):
        backbone["model"] = absolute(backbone["model"])
    prompts["tuned"] = _or_bundled(absolute(prompts["tuned"]))
    for section in ("thresholds", "gate", "calibration"):
        data[section]["frames"] = frames(data[section]["frames"])
    data["calibration"]["ranges"] = absolute(data["calibration"]["ranges"])
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

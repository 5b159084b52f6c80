"""Activation ranges: how far the inputs of an encoder's Linears reach on a line's own frames, as a small file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dapo_edge.backends.onnx_graph import IMAGE, PlainGraph
from dapo_edge.backends.onnx_linears import find_linears, weights_digest
from dapo_edge.calibration.histograms import ESTIMATORS
from dapo_edge.errors import RecipeError
from dapo_edge.files import write_atomically

FORMAT = "dapo-edge ranges 1"
SUFFIX = ".ranges.json"
HISTOGRAM_BINS, HISTOGRAM_OCTAVES = 64, 10  # of the coarse histograms: equal ratios, from max / 2^10 to max
_AGAIN = "Make them again: dapo-edge calibrate RECIPE"
_CHANNEL_DIGITS = 3


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def histogram_edges(largest: float) -> NDArray[np.float64]:
    """Bounds [HISTOGRAM_BINS + 1] of a coarse histogram's bins up to `largest`; the first one really begins at 0."""
    return largest * 2.0 ** (HISTOGRAM_OCTAVES * (np.arange(HISTOGRAM_BINS + 1) / HISTOGRAM_BINS - 1))


class LinearRange(_Part):
    """What was seen at the input of one Linear."""

    estimates: Mapping[str, float]  # by `ESTIMATORS`: how far an INT8 scale should reach, in (0, max]
    channels: tuple[float, ...] | None  # largest |value| of each input channel, to 3 digits; None for fc2
    histogram: tuple[int, ...]  # values per bin of |x|, see histogram_edges

    @property
    def max(self) -> float:
        """The largest |value|."""
        return self.estimates["max"]

    @property
    def channel_max(self) -> NDArray[np.float32]:
        """Largest |value| per input channel [in]. Raises `ValueError` for fc2, whose channels are not kept."""
        if self.channels is None:
            raise ValueError("the channels of this Linear's input were not kept")
        return np.array(self.channels, np.float32)

    @model_validator(mode="after")
    def _consistent(self) -> LinearRange:
        if tuple(self.estimates) != ESTIMATORS:
            raise ValueError(f"estimates must be {', '.join(ESTIMATORS)}")
        if not all(0 < value <= self.max for value in self.estimates.values()):
            raise ValueError("estimates must lie above 0, and none above max")
        if len(self.histogram) != HISTOGRAM_BINS or min(self.histogram) < 0:
            raise ValueError(f"a histogram must have {HISTOGRAM_BINS} counts from 0 on")
        rounding = 10 ** (1 - _CHANNEL_DIGITS)
        if self.channels is not None and not (
            min(self.channels, default=-1) >= 0 and math.isclose(max(self.channels), self.max, rel_tol=rounding)
        ):
            raise ValueError("channels must be numbers from 0 on, the largest of them max")
        return self


class CalibrationFrames(_Part):
    """The frames that the ranges were measured on. offered = used + unreadable + constant + not picked."""

    source: str  # without passwords
    offered: int = Field(ge=1)
    used: int = Field(ge=1)
    unreadable: int = Field(ge=0)
    constant: int = Field(ge=0)  # without contrast
    not_picked: int = Field(ge=0)  # left out because others are more different from each other
    similarity: float = Field(ge=-1, le=1)  # mean cosine between image embeddings of two frames


class ActivationRanges(_Part):
    """Ranges of one encoder's Linear inputs over calibration frames; as a file, `<name>.ranges.json`."""

    weights: str  # digest of the encoder (onnx_linears.weights_digest)
    backbone: str  # in words
    batch: int = Field(ge=1)  # of the encoder
    image_size: int = Field(ge=1)  # px
    frames: CalibrationFrames
    created: str
    versions: dict[str, str]
    linears: Mapping[str, LinearRange]  # in the order of execution, e.g. block3.fc1

    def to_json(self) -> str:
        """The file's text: one line per Linear, so that two files can be compared line by line."""
        fields = self.model_dump(mode="json")
        linears = fields.pop("linears")
        head = {"format": FORMAT, "digest": _digest(fields, linears), **fields}
        lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in head.items()]
        rows = ",\n".join(f"  {json.dumps(name)}: {_compact(row)}" for name, row in linears.items())
        return "{\n" + ",\n".join(f" {line}" for line in [*lines, f'"linears": {{\n{rows}\n }}']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, origin: str) -> ActivationRanges:
        """Read a file's text; `origin` names it in errors. Raises `RecipeError`."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"the activation ranges '{origin}' are no JSON ({error})", _AGAIN) from error
        found = content.pop("format", "unknown") if isinstance(content, dict) else "unknown"
        if found != FORMAT:
            raise RecipeError(
                f"'{origin}' holds no activation ranges of this version (format {found!r:.40})",
                f"Name a file that dapo-edge calibrate wrote. {_AGAIN}",
            )
        noted = content.pop("digest", None)
        rest = {key: value for key, value in content.items() if key != "linears"}
        if noted != _digest(rest, content.get("linears")):
            raise RecipeError(f"the activation ranges '{origin}' were edited or cut off", _AGAIN)
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecipeError(
                f"the activation ranges '{origin}' are wrong at '{where}': {first['msg']}", _AGAIN
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> ActivationRanges:
        """Read a file. Raises `RecipeError`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise RecipeError(
                f"the activation ranges '{path}' can't be read ({reason})",
                "Check 'calibration.ranges' in the recipe, or make them: dapo-edge calibrate RECIPE",
            ) from error
        return cls.from_json(text, str(path))

    def write(self, path: Path) -> Path:
        """Write the file, or leave an older one as it was. Raises `OutputError`."""
        return write_atomically(path, self.to_json().encode())

    def check_fit(self, graph: PlainGraph) -> ActivationRanges:
        """These ranges, if they are the encoder's own. Raises `RecipeError` saying whose they are."""
        batch, _, size, _ = graph.shapes[IMAGE]
        if self.image_size != size:
            problem = f"of image size {self.image_size} px, the encoder has {size} px"
        elif self.batch != batch:
            problem = f"of an encoder of batch {self.batch}, this one has batch {batch}"
        elif self.weights != weights_digest(graph):
            problem = f"of an encoder with other weights ({self.backbone} on {self.created[:10]})"
        elif list(self.linears) != [linear.name for linear in find_linears(graph)]:
            problem = f"of other Linears ({len(self.linears)})"
        else:
            return self
        raise RecipeError(f"the activation ranges are {problem}", _AGAIN)


def rounded_channels(largest: NDArray[np.float32]) -> tuple[float, ...]:
    """Largest |value| per channel as a file holds it."""
    return tuple(float(f"{value:.{_CHANNEL_DIGITS}g}") for value in largest)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _digest(fields: Mapping[str, Any], linears: Any) -> str:
    content = json.dumps([fields, linears], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:32]

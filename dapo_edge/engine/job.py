"""One build in progress: what its steps share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dapo_edge.config import Recipe
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.method import Method
from dapo_edge.package import Preprocessing
from dapo_edge.prompt_bank import PromptBank

Progress = Callable[[str, int, int], None]  # step in words, done, of


@dataclass(frozen=True, eq=False)
class Job:
    """A recipe and what was made of it."""

    recipe: Recipe
    method: Method
    bank: PromptBank
    spec: MapSpec
    preprocessing: Preprocessing
    progress: Progress

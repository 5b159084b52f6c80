"""What the benchmarks share: where results go, the workload that several of them time, and how they report."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dapo_edge.config import Recipe, parse_recipe
from dapo_edge.data.belt import Belt
from dapo_edge.data.surfaces import DEFECTS
from dapo_edge.device import this_device
from dapo_edge.errors import DapoEdgeError, OutputError
from dapo_edge.files import check_file
from dapo_edge.prompt_bank import PromptBank
from dapo_edge.structures import NORMAL

HERE = Path(__file__).parent
DEMO_RECIPE = HERE.parent / "dapo_edge" / "assets" / "surface-tiny.yaml"
FRAME_SIZE = (1920, 1080)


def results_folder() -> Path:
    """Where results of this very device lie."""
    device = this_device()
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", f"{device.cpu} {device.cores} cores".lower()).strip("-")


def result_file(text: str) -> Path:
    """Where a result will be written, as a type of argparse: refused before minutes are spent."""
    path = Path(text)
    try:
        check_file(path)
    except OutputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a script: what it refuses is one line, and so is an interruption."""
    try:
        sys.exit(main())
    except DapoEdgeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: what was not written yet is lost", file=sys.stderr)
        sys.exit(130)


def timed(call: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """What does so many calls in a row, and returns their milliseconds."""

    def side() -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - started) * 1e3

    return side


@functools.lru_cache(maxsize=1)
def belt_frame(size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] BGR of (width, height), always the same."""
    return Belt(size, seed=1).frame(0).image


def vit_b16() -> Recipe:
    """ViT-B/16 at 224 px with seeded weights and 18 defect types."""
    return parse_recipe(
        {
            "name": "vit-b16-224",
            "backbone": {"model": "ViT-B-16"},
            "feature_layers": [3, 6, 9, 12],
            "prompts": {"defects": list(DEFECTS)},
            "gate": {"count": 2},
        }
    )


def released() -> Recipe:
    """The released DAPO: ViT-L/14 at 518 px, four tapped blocks, 20 defect types, no smoothing; seeded weights."""
    return parse_recipe(
        {
            "name": "dapo-vitl14-518",
            "backbone": {"model": "ViT-L-14-336-quickgelu"},
            "image_size": 518,
            "feature_layers": [6, 12, 18, 24],
            "prompts": {"defects": [f"defect {number}" for number in range(1, 21)], "readout": "release"},
            "map": {"smoothing_px": 0},
            "gate": {"count": 1},
        }
    )


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def say(what: str, value: dict[str, Any]) -> dict[str, Any]:
    """Print a part of the result as soon as it is there, and hand it on."""
    print(f"{what}: {json.dumps(value)}", file=sys.stderr)
    return value


def bank_around(tokens: NDArray[np.float32], types: int, seed: int = 0) -> PromptBank:
    """A bank of `types` defect types, unit rows drawn around real patch tokens [1, L, N, D].

    With seeded weights the words' own rows give nearly flat maps, which no line would show.
    """
    patches = tokens[0].reshape(-1, tokens.shape[-1])
    centred = patches - patches.mean(axis=0)
    draw = np.random.default_rng(seed)
    rows = centred[draw.choice(len(centred), types + 1, replace=False)]
    rows = rows + 0.1 * rows.std() * draw.standard_normal(rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return PromptBank((NORMAL, *(f"type {number}" for number in range(1, types + 1))), rows.astype(np.float32))

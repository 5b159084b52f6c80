"""The comparison of surfaces-v1: DAPO, DAPO without each of its parts, and three baselines, on five test sets.

benchmarks/README.md explains the protocol, `data/surfaces-v1.yaml` splits the world.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dapo_edge.config import TuningPlan
from dapo_edge.data import protocol
from dapo_edge.data.protocol import Split, surfaces_v1
from dapo_edge.device import as_json, this_device
from dapo_edge.errors import RecipeError
from dapo_edge.evaluation.features import Features, metrics_of, score_images
from dapo_edge.files import write_atomically
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec, ScoreRule
from dapo_edge.models.baselines import AdaptersOnly, FixedAdapters, Handcrafted, TwoPrompts
from dapo_edge.models.clip import Clip
from dapo_edge.models.dapo import Dapo, DapoOptions
from dapo_edge.training.trainer import Trainer, split_pictures
from dapo_edge.training.views import AnyDefect, ViewStore, World

SCHEMA = "dapo-edge surfaces-v1 1"
NOUN = "object"
FULL = DapoOptions(groups=4, context_tokens=5, text_depth=4, text_tokens=4, visual_tokens=4)
SMOOTHING_PX = 4.0

Results = dict[str, dict[str, dict[str, Any]]]  # method -> seed -> test set -> metrics


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    make: Callable[[Clip, int], Dapo]  # (clip, seed)
    knows_types: bool = True
    learns: bool = True


def _dapo(**changes: Any) -> Callable[[Clip, int], Dapo]:
    return lambda clip, seed: Dapo(clip, options=FULL.model_copy(update=changes), seed=seed)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("handcrafted", lambda clip, seed: Handcrafted(clip), learns=False),
        Variant("two prompts", lambda clip, seed: TwoPrompts(clip, seed=seed), knows_types=False),
        Variant("adapters only", lambda clip, seed: AdaptersOnly(clip, seed=seed)),
        Variant("dapo", _dapo()),
        Variant("dapo - prompt tokens", _dapo(context_tokens=0, groups=1)),
        Variant("dapo - prompt groups", _dapo(groups=1)),
        Variant("dapo - deep text tokens", _dapo(text_depth=0, text_tokens=0)),
        Variant("dapo - deep visual tokens", _dapo(visual_tokens=0)),
        Variant("dapo - adapters", lambda clip, seed: FixedAdapters(clip, options=FULL, seed=seed)),
    )
}
BASELINES = ("handcrafted", "two prompts", "adapters only")

# What each test set holds. d shows the pictures of b through a worse camera.
TEST_SETS: dict[str, Callable[[Split], dict[str, Any]]] = {
    "a": lambda s: {"materials": s.tuned_materials, "defects": s.tuned_defects},
    "b": lambda s: {"materials": s.new_materials, "defects": s.tuned_defects},
    "c": lambda s: {"materials": s.new_materials, "defects": s.novel_defects},
    "d": lambda s: {"materials": s.new_materials, "defects": s.tuned_defects, "shifted": True},
    "e": lambda s: {"materials": s.unseen_materials, "defects": s.tuned_defects},
}
# Seeds of their pictures in the protocol's test stretch. 0 to 3 were looked at while settings were being chosen.
_SEEDS = {"a": 4, "b": 5, "c": 6, "d": 5, "e": 7}


class Comparison:
    """Tunes and tests variants; every result is kept in a file, so that a stopped comparison goes on."""

    def __init__(self, clip: Clip, path: Path, plan: TuningPlan, test_images: int) -> None:
        """Results go to `path` (JSON), tuned prompts to a folder beside it. Raises `RecipeError` for a foreign file."""
        self.path = path
        self._clip, self._plan, self._test_images = clip, plan, test_images
        self._tuned = path.parent / f"{path.stem}.tuned"
        self._settings = {
            "plan": plan.model_dump(mode="json"),
            "test_images": test_images,
            "backbone": {"name": clip.name, "weights": clip.weights, "fingerprint": clip.fingerprint},
            "options": FULL.model_dump(),
            "smoothing_px": SMOOTHING_PX,
            "test_seeds": _SEEDS,
        }
        self.results = self._earlier()
        self._tests = {name: self._store(name) for name in TEST_SETS}
        self._plain: dict[tuple[str, tuple[int, ...]], Features] = {}

    def lacks(self, variant: Variant, seed: int) -> bool:
        """Whether the results have no such run yet."""
        return str(seed) not in self.results.get(variant.name, {})

    def measure(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Tune one variant with one seed (if it learns), and count it on all test sets: an entry of the results."""
        method = variant.make(self._clip, seed)
        split = surfaces_v1()
        pictures = World(
            protocol.first_picture(protocol.TUNING, seed, self._plan.images),
            self._plan.images,
            method.image_size,
            split.tuned_materials,
            split.tuned_defects,
            max_defects=2,
        )
        store = ViewStore(pictures if variant.knows_types else AnyDefect(pictures), method.image_size)
        plan = self._plan.model_copy(update={"seed": seed})
        phrases = self._phrases(variant, split.tuned_defects)
        entry: dict[str, Any] = {}
        if variant.learns:
            run = Trainer(method, store, phrases, NOUN, plan, spec=_spec(method)).tune()
            entry["tuning"] = [epoch.as_json() for epoch in run.history]
            self._keep(method, variant, seed)
        spec = choose_score(method, store, split_pictures(store, plan)[1], phrases)
        entry["score"] = spec.score
        for name in TEST_SETS:
            entry[name] = self._tested(variant, method, name, spec)
        return entry

    def add(self, variant: Variant, seed: int, entry: dict[str, Any]) -> None:
        """Put an entry into the results, in the order of the table, and write them."""
        self.results.setdefault(variant.name, {})[str(seed)] = entry
        self.results = {
            name: dict(sorted(self.results[name].items(), key=lambda run: int(run[0])))
            for name in VARIANTS
            if name in self.results
        }
        self._save()

    def maps(self, variant: Variant, seed: int, test: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Anomaly maps [n, S, S] of some pictures of a test set, by an earlier run's prompts."""
        method = self._as_tuned(variant, seed)
        spec = _spec(method)
        with torch.no_grad():
            rows = method.rows(self._phrases(variant, TEST_SETS[test](surfaces_v1())["defects"]), NOUN)
            taps, _, types = self._features(test, method).fetch(indices)
            tokens = method.adapt(taps)
        share = reference.patch_probabilities(tokens.numpy(), rows.numpy(), spec.temperature, spec.grid)
        return reference.anomaly_map(share, *spec.tables((types.shape[2], types.shape[1])))

    def pictures(self, test: str, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images [n, S, S, 3] BGR and true types [n, S, S] of a test set."""
        return self._tests[test].fetch(indices)

    def has_prompts(self, variant: Variant, seed: int) -> bool:
        """Whether `maps` has what it needs; tuned prompts are not versioned."""
        return not variant.learns or self._file(variant, seed).exists()

    def _save(self) -> None:
        content = {
            "schema": SCHEMA,
            "date": datetime.date.today().isoformat(),
            "device": as_json(this_device()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "settings": self._settings,
            "claims": claims(self.results),
            "results": self.results,
        }
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def _earlier(self) -> Results:
        if not self.path.exists():
            return {}
        content = json.loads(self.path.read_text(encoding="utf-8"))
        if content.get("settings") != self._settings:
            raise RecipeError(
                f"'{self.path}' holds results of other settings", "Name another file (--out), or delete it"
            )
        results: Results = content["results"]
        return results

    def _store(self, name: str) -> ViewStore:
        first = protocol.first_picture(protocol.TEST, _SEEDS[name], self._test_images)
        world = World(first, self._test_images, self._clip.image_size, **TEST_SETS[name](surfaces_v1()))
        return ViewStore(world, self._clip.image_size)

    def _tested(self, variant: Variant, method: Dapo, name: str, spec: MapSpec) -> dict[str, Any]:
        phrases = self._phrases(variant, TEST_SETS[name](surfaces_v1())["defects"])
        features = self._features(name, method)
        metrics = metrics_of(method, features, range(self._test_images), phrases, NOUN, spec).as_json()
        if not variant.knows_types:
            metrics["type_accuracy"] = None
        return dict(metrics)

    def _features(self, test: str, method: Dapo) -> Features:
        """Those of the plain encoder are the same for all methods that leave it alone."""
        if method.visual_tokens.numel():
            return Features(method, self._tests[test], frozen=False)
        key = (test, method.feature_layers)
        if key not in self._plain:
            self._plain[key] = Features(method, self._tests[test])
        return self._plain[key]

    @staticmethod
    def _phrases(variant: Variant, defects: Sequence[str]) -> tuple[str, ...]:
        return tuple(defects) if variant.knows_types else AnyDefect.NAMES[1:]

    def _file(self, variant: Variant, seed: int) -> Path:
        return self._tuned / f"{variant.name.replace(' ', '-')}-{seed}.safetensors"

    def _keep(self, method: Dapo, variant: Variant, seed: int) -> None:
        from safetensors.torch import save

        tensors = {f"{part}.{n}": p.detach() for part, ps in method.learnables().items() for n, p in enumerate(ps)}
        write_atomically(self._file(variant, seed), save(tensors))
        if type(method) is Dapo:
            method.save(self._tuned / f"{variant.name.replace(' ', '-')}-{seed}.dapo.safetensors")

    @torch.no_grad()
    def _as_tuned(self, variant: Variant, seed: int) -> Dapo:
        method = variant.make(self._clip, seed)
        if variant.learns:
            from safetensors.torch import load_file

            tensors = load_file(self._file(variant, seed))
            for part, parameters in method.learnables().items():
                for number, parameter in enumerate(parameters):
                    parameter.copy_(tensors[f"{part}.{number}"])
        return method


def choose_score(method: Dapo, store: ViewStore, indices: Sequence[int], phrases: Sequence[str]) -> MapSpec:
    """The map spec whose score rule ranks the validation pictures best; every method gets this choice."""
    spec = _spec(method)
    features = Features(method, store)  # by now nothing learns: the three rules share one pass of the encoder

    def quality(rule: ScoreRule) -> float:
        metrics = score_images(method, features, indices, phrases, NOUN, replace(spec, score=rule))
        return metrics.curve().auroc()

    return replace(spec, score=max(get_args(ScoreRule), key=quality))


def _spec(method: Dapo) -> MapSpec:
    return MapSpec(method.image_size, method.grid, method.temperature, method.align_corners, SMOOTHING_PX, "image")


def claims(results: Results) -> dict[str, dict[str, float | str]]:
    """The paper's two claims, in points: DAPO against the best baseline under shift (d), and on novel types (c).

    The second is about localising types, for which there are two metrics; each is compared with its own best baseline.
    """
    wanted = {
        "d: mean of image AUROC and AP": (("d", "image_auroc"), ("d", "image_ap")),
        "c: pixel AUROC per type": (("c", "type_pixel_auroc"),),
        "c: pixel F1-max per type": (("c", "type_pixel_f1_max"),),
    }
    found: dict[str, dict[str, float | str]] = {}
    for claim, metrics in wanted.items():
        values = {
            name: [run[test][metric] for run in runs.values() for test, metric in metrics]
            for name, runs in results.items()
        }
        means = {name: 100 * float(np.mean(known)) for name, known in values.items() if None not in known}
        baselines = {name: mean for name, mean in means.items() if name in BASELINES}
        if "dapo" in means and baselines:
            best = max(baselines, key=lambda name: baselines[name])
            margin = means["dapo"] - baselines[best]
            found[claim] = {"dapo": means["dapo"], "best_baseline": best, "its": baselines[best], "margin": margin}
    return found


COLUMNS = (
    ("a", "pixel_auroc"), ("b", "pixel_auroc"), ("b", "aupro"), ("b", "image_auroc"), ("b", "type_accuracy"),
    ("c", "pixel_auroc"), ("c", "type_pixel_auroc"), ("c", "type_pixel_f1_max"), ("c", "type_accuracy"),
    ("d", "image_auroc"), ("d", "image_ap"), ("e", "pixel_auroc"), ("e", "image_auroc"),
)  # fmt: skip


def markdown(results: Results) -> str:
    """The table of benchmarks/README.md, in percent: mean over seeds ± half of their range."""
    lines = [
        "| method | " + " | ".join(f"{test}: {metric.replace('_', ' ')}" for test, metric in COLUMNS) + " |",
        "|---|" + "--:|" * len(COLUMNS),
    ]
    for name, runs in results.items():
        cells = [_cell([run[test][metric] for run in runs.values()]) for test, metric in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.1f}" + (f" ± {(max(known) - min(known)) / 2:.1f}" if len(known) > 1 else "")

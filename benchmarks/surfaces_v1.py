"""The comparison table of the protocol surfaces-v1: DAPO, DAPO without each of its parts, and three baselines.

    python benchmarks/surfaces_v1.py    # three seeds; goes on where it was stopped

Writes results/<device>/surfaces-v1.json and two figures beside it. README.md of this folder explains the protocol.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from dapo_edge.config import Stage, TuningPlan
from dapo_edge.data.flaws import DEFECTS
from dapo_edge.data.materials import MATERIALS
from dapo_edge.data.protocol import TEST_SEED, TUNING_SEED, Split, surfaces_v1
from dapo_edge.data.surfaces import make_surface
from dapo_edge.device import as_json, this_device
from dapo_edge.kernels import reference
from dapo_edge.kernels.map_spec import MapSpec
from dapo_edge.models.baselines import AdaptersOnly, Handcrafted, TwoPrompts
from dapo_edge.models.clip import Clip, load_clip
from dapo_edge.models.dapo import Dapo, DapoOptions
from dapo_edge.structures import NORMAL
from dapo_edge.training.trainer import Features, Trainer, evaluate
from dapo_edge.training.views import View, ViewStore, World

HERE = Path(__file__).parent
NOUN = "object"
ANY_DEFECT = "damaged"  # the one word of a method that knows no types
FULL = DapoOptions(groups=4, context_tokens=5, text_depth=4, text_tokens=4, visual_tokens=4)
SMOOTHING_PX = 4.0


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    make: Callable[[Clip, int], Dapo]
    knows_types: bool = True
    learns: bool = True


def _dapo(**changes: Any) -> Callable[[Clip, int], Dapo]:
    return lambda clip, seed: Dapo(clip, options=FULL.model_copy(update=changes), seed=seed)


class FixedAdapters(Dapo):
    """DAPO whose adapters stay at CLIP's own projection."""

    def learnables(self) -> Any:
        """All but the adapters."""
        return {part: parameters for part, parameters in super().learnables().items() if part != "adapters"}


CONTENDERS = (
    Contender("handcrafted", lambda clip, seed: Handcrafted(clip), learns=False),
    Contender("two prompts", lambda clip, seed: TwoPrompts(clip, seed=seed), knows_types=False),
    Contender("adapters only", lambda clip, seed: AdaptersOnly(clip, seed=seed)),
    Contender("dapo", _dapo()),
    Contender("dapo - prompt tokens", _dapo(context_tokens=0, groups=1)),
    Contender("dapo - prompt groups", _dapo(groups=1)),
    Contender("dapo - deep text tokens", _dapo(text_depth=0, text_tokens=0)),
    Contender("dapo - deep visual tokens", _dapo(visual_tokens=0)),
    Contender("dapo - adapters", lambda clip, seed: FixedAdapters(clip, options=FULL, seed=seed)),
)
BASELINES = ("handcrafted", "two prompts", "adapters only")

# Test set: what it holds, and whether cameras are under shift. The letters are those of the protocol.
TEST_SETS: dict[str, Callable[[Split], dict[str, Any]]] = {
    "a": lambda s: {"materials": s.tuned_materials, "defects": s.tuned_defects},
    "b": lambda s: {"materials": s.new_materials, "defects": s.tuned_defects},
    "c": lambda s: {"materials": s.new_materials, "defects": s.novel_defects},
    "d": lambda s: {"materials": s.new_materials, "defects": s.tuned_defects, "shifted": True},
    "e": lambda s: {"materials": s.unseen_materials, "defects": s.tuned_defects},
}


@dataclass(frozen=True)
class AnyDefect:
    """A world in which all defects are one type."""

    world: World

    @property
    def names(self) -> tuple[str, ...]:
        """Normal, and everything else."""
        return (NORMAL, ANY_DEFECT)

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> View:
        view = self.world[index]
        return View(view.image, (view.types > 0).astype(np.uint8))


class Table:
    """Tunes and tests contenders, and keeps the results in a file so that a stopped run goes on."""

    def __init__(self, clip: Clip, path: Path, plan: TuningPlan, test_images: int) -> None:
        self._clip, self._path, self._plan, self._test_images = clip, path, plan, test_images
        self._keep = path.parent / "tuned"  # ignored by git; the figure and the bundled prompts come from there
        self._settings = {
            "plan": plan.model_dump(mode="json"),
            "test_images": test_images,
            "backbone": {"name": clip.name, "weights": clip.weights, "fingerprint": clip.fingerprint},
            "options": FULL.model_dump(),
            "smoothing_px": SMOOTHING_PX,
        }
        self.results: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier["settings"] == self._settings:
                self.results = earlier["results"]
        self._tests = {name: self._store(TEST_SEED + 10**6 * n, name) for n, name in enumerate(TEST_SETS)}
        self._plain: dict[tuple[str, tuple[int, ...]], Features] = {}

    def _store(self, first: int, name: str) -> ViewStore:
        world = World(first, self._test_images, self._clip.image_size, **TEST_SETS[name](surfaces_v1()))
        return ViewStore(world, self._clip.image_size)

    def run(self, contender: Contender, seed: int) -> None:
        """One contender, tuned with one seed (if it learns), on all test sets."""
        if str(seed) in self.results.get(contender.name, {}):
            return
        torch.manual_seed(seed)
        method = contender.make(self._clip, seed)
        split = surfaces_v1()
        entry: dict[str, Any] = {}
        if contender.learns:
            entry["tuning"] = self._tune(contender, method, seed)
            self._keep.mkdir(parents=True, exist_ok=True)
            torch.save(method.learnables(), self._keep / f"{contender.name} {seed}.pt")
        for name in TEST_SETS:
            defects = TEST_SETS[name](split)["defects"]
            phrases = defects if contender.knows_types else (ANY_DEFECT,)
            features = self._features(name, method)
            summary = evaluate(method, features, range(self._test_images), phrases, NOUN, self._spec(method))
            entry[name] = summary.as_json()
        self.results.setdefault(contender.name, {})[str(seed)] = entry
        self.save()

    def _tune(self, contender: Contender, method: Dapo, seed: int) -> list[dict[str, Any]]:
        split = surfaces_v1()
        plan = self._plan.model_copy(update={"seed": seed})
        first = TUNING_SEED + seed * 100_000
        world = World(first, plan.images, method.image_size, split.tuned_materials, split.tuned_defects, max_defects=2)
        pictures = world if contender.knows_types else AnyDefect(world)
        phrases = split.tuned_defects if contender.knows_types else (ANY_DEFECT,)
        store = ViewStore(pictures, method.image_size)
        run = Trainer(method, store, phrases, NOUN, plan, spec=self._spec(method)).tune()
        return [epoch.as_json() for epoch in run.history]

    def _features(self, test: str, method: Dapo) -> Features:
        """Those of the plain encoder are the same for all methods that leave it alone."""
        precision = self._plan.precision
        if method.visual_tokens.numel():
            return Features(method, self._tests[test], precision=precision, frozen=False)
        key = (test, method.feature_layers)
        if key not in self._plain:
            self._plain[key] = Features(method, self._tests[test], precision=precision)
        return self._plain[key]

    @staticmethod
    def _spec(method: Dapo) -> MapSpec:
        return MapSpec(method.image_size, method.grid, method.temperature, method.align_corners, SMOOTHING_PX, "image")

    def tuned(self, contender: Contender, seed: int) -> Dapo:
        """A contender as an earlier run left it."""
        method = contender.make(self._clip, seed)
        if contender.learns:
            learnt = torch.load(self._keep / f"{contender.name} {seed}.pt", weights_only=True)
            with torch.no_grad():
                for part, parameters in method.learnables().items():
                    for parameter, tensor in zip(parameters, learnt[part], strict=True):
                        parameter.copy_(tensor)
        return method

    def maps(self, contender: Contender, seed: int, test: str, indices: Sequence[int]) -> NDArray[np.float32]:
        """Anomaly maps [n, S, S] of some pictures of a test set."""
        method = self.tuned(contender, seed)
        defects = TEST_SETS[test](surfaces_v1())["defects"]
        spec = self._spec(method)
        with torch.no_grad():
            rows = method.rows(defects if contender.knows_types else (ANY_DEFECT,), NOUN)
            taps, _, types = self._features(test, method).fetch(indices)
            tokens = method.adapt(taps)
        share = reference.patch_probabilities(tokens.numpy(), rows.numpy(), spec.temperature, spec.grid)
        return reference.anomaly_map(share, *spec.tables((types.shape[2], types.shape[1])))

    def pictures(self, test: str, indices: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images [n, S, S, 3] BGR and true types [n, S, S]."""
        return self._tests[test].fetch(indices)

    def save(self) -> None:
        """Write all results so far."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": "dapo-edge surfaces-v1 1",
            "command": "python benchmarks/surfaces_v1.py",
            "date": datetime.date.today().isoformat(),
            "device": as_json(this_device()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "settings": self._settings,
            "results": self.results,
        }
        self._path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def markdown(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table of benchmarks/README.md: mean ± half the spread over seeds, in percent."""
    columns = (
        ("b", "pixel_auroc"), ("b", "aupro"), ("b", "image_auroc"), ("b", "type_accuracy"), ("c", "pixel_auroc"),
        ("c", "type_pixel_auroc"), ("c", "type_pixel_f1_max"), ("c", "type_accuracy"), ("d", "image_auroc"),
        ("d", "image_ap"), ("e", "pixel_auroc"), ("e", "image_auroc"),
    )  # fmt: skip
    lines = [
        "| method | " + " | ".join(f"{name}: {metric.replace('_', ' ')}" for name, metric in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for contender, runs in results.items():
        cells = [_cell([run[name][metric] for run in runs.values()]) for name, metric in columns]
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.1f}" + (f" ± {(max(known) - min(known)) / 2:.1f}" if len(known) > 1 else "")


# Pictures of the figure: test set and number, chosen for showing different materials and types.
SHOWN = (("b", (2, 5, 7)), ("c", (1, 4, 6)), ("d", (3, 8)))
FIVE = ("handcrafted", "two prompts", "adapters only", "dapo - deep visual tokens", "dapo")


def draw_maps(table: Table, path: Path) -> None:
    """Picture, truth, and the anomaly maps of five methods, side by side."""
    from matplotlib.figure import Figure

    contenders = [contender for name in FIVE for contender in CONTENDERS if contender.name == name]
    count = sum(len(indices) for _, indices in SHOWN)
    figure = Figure(figsize=(1.5 * (len(FIVE) + 2), 1.55 * count), layout="constrained")
    axes = figure.subplots(count, len(FIVE) + 2)
    row = 0
    for test, indices in SHOWN:
        images, types = table.pictures(test, indices)
        maps = [table.maps(contender, 0, test, indices) for contender in contenders]
        names = (NORMAL, *TEST_SETS[test](surfaces_v1())["defects"])
        for n in range(len(indices)):
            truth = ", ".join(names[k] for k in np.unique(types[n]) if k) or "good"
            axes[row, 0].imshow(images[n][..., ::-1])
            axes[row, 0].set_ylabel(f"{test}: {truth}", fontsize=8)
            axes[row, 1].imshow(types[n] > 0, cmap="gray", vmin=0, vmax=1)
            for column, anomaly in enumerate(maps, start=2):
                axes[row, column].imshow(anomaly[n], cmap="inferno", vmin=0, vmax=1)
            row += 1
    for axis, title in zip(axes[0], ("picture", "truth", *FIVE), strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=90)


def draw_world(path: Path, side: int = 96) -> None:
    """Every defect on every material, and every material without one, with their names."""
    from matplotlib.figure import Figure

    kinds = (None, *DEFECTS)
    rows = [
        np.hstack(
            [
                make_surface(
                    1000 * row + column,
                    (side, side),
                    materials=(material,),
                    defects=(kind or "hole",),
                    good_share=0.0 if kind else 1.0,
                ).image
                for column, material in enumerate(MATERIALS)
            ]
        )
        for row, kind in enumerate(kinds)
    ]
    figure = Figure(figsize=(11, 12.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.vstack(rows)[..., ::-1])
    middles = side * (0.5 + np.arange(len(kinds)))
    axis.set_xticks(middles[: len(MATERIALS)], [name.replace(" ", "\n") for name in MATERIALS], fontsize=8)
    axis.set_yticks(middles, [kind or "good" for kind in kinds], fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_frame_on(False)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 82})


def draw_ablation(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """What each part of DAPO is worth: bars of the mean over seeds, every seed a dot."""
    from matplotlib.figure import Figure

    columns = (("b", "pixel_auroc"), ("b", "aupro"), ("b", "image_auroc"), ("c", "pixel_auroc"), ("c", "type_accuracy"))
    figure = Figure(figsize=(2.6 * len(columns), 3.6), layout="constrained")
    names = list(results)
    for axis, (test, metric) in zip(figure.subplots(1, len(columns), sharey=True), columns, strict=True):
        values = [[run[test][metric] for run in results[name].values()] for name in names]
        means = [np.mean([v for v in runs if v is not None] or [0]) for runs in values]
        axis.barh(names, means, color=["#9aa5b1" if name in BASELINES else "#2f7fd1" for name in names])
        for place, runs in enumerate(values):
            axis.plot([v or 0 for v in runs], [place] * len(runs), "k.", markersize=4)
        axis.set(title=f"{test}: {metric.replace('_', ' ')}", xlim=(max(0, min(means) - 0.1), 1))
        axis.grid(axis="x", alpha=0.3)
        axis.invert_yaxis()
    figure.savefig(path, dpi=90)


@click.command(help=(__doc__ or "").partition("\n\n")[0])
@click.option("--seeds", default="0,1,2", show_default=True, help="Comma-separated.")
@click.option("--only", help="Comma-separated names of contenders.")
@click.option("--images", default=1500, show_default=True, help="To tune on.")
@click.option("--epochs", default=6, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--test-images", default=250, show_default=True, help="In each of the five test sets.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Other weights than the bundled ones.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON [results/<device>/surfaces-v1.json].")
def main(
    seeds: str,
    only: str | None,
    images: int,
    epochs: int,
    learning_rate: float,
    batch: int,
    test_images: int,
    checkpoint: Path | None,
    out: Path | None,
) -> None:
    """Run what is missing, then print the table."""
    device = this_device()
    folder = HERE / "results" / re.sub(r"[^a-z0-9]+", "-", f"{device.cpu} {device.cores} cores".lower()).strip("-")
    clip = load_clip("surface-tiny", pretrained=None if checkpoint else "surfaces-v1", checkpoint=checkpoint)
    plan = TuningPlan(
        images=images,
        batch=batch,
        precision="bf16",
        loss_px=clip.image_size // 2,
        stages=(Stage(epochs=epochs, learning_rate=learning_rate),),
    )
    out = out or folder / "surfaces-v1.json"
    table = Table(clip, out, plan, test_images)
    chosen = [c for c in CONTENDERS if not only or c.name in only.split(",")]
    for seed in map(int, seeds.split(",")):
        for contender in chosen:
            table.run(contender, seed)
            click.echo(f"{contender.name}, seed {seed}", err=True)
    click.echo(markdown(table.results))
    draw_world(HERE.parent / "docs" / "surfaces.jpg")
    draw_ablation(table.results, out.with_name("surfaces-v1-ablation.png"))
    if all("0" in table.results.get(name, {}) for name in FIVE):
        draw_maps(table, out.with_name("surfaces-v1-maps.png"))


if __name__ == "__main__":
    main()

"""The comparison of surfaces-v1, as a table, a JSON and three figures.

python benchmarks/surfaces_v1.py    # three seeds; goes on where it was stopped

A method whose encoder is frozen takes minutes, one with deep visual tokens learns slowly: `--jobs` runs side by side,
each on its share of the cores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from common import results_folder
from threadpoolctl import threadpool_limits

from dapo_edge.config import Stage, TuningPlan
from dapo_edge.evaluation.comparison import VARIANTS, Comparison, claims, markdown
from dapo_edge.evaluation.figures import FIVE, draw_ablation, draw_maps, draw_tuning, draw_world
from dapo_edge.models.clip import load_clip

HERE = Path(__file__).parent


@click.command(help=(__doc__ or "").partition("\n\n")[0])
@click.option("--seeds", default="0,1,2", show_default=True, help="Comma-separated.")
@click.option("--only", default=",".join(VARIANTS), help="Comma-separated names of lines of the table.")
@click.option("--images", default=1500, show_default=True, help="To tune on.")
@click.option("--epochs", default=4, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--test-images", default=500, show_default=True, type=click.IntRange(min=10), help="In each test set.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Other weights than the bundled ones.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Runs at the same time.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON [results/<device>/surfaces-v1.json].")
def main(
    seeds: str,
    only: str,
    images: int,
    epochs: int,
    learning_rate: float,
    batch: int,
    test_images: int,
    checkpoint: Path | None,
    jobs: int,
    out: Path | None,
) -> None:
    """Run what is missing, then print the table."""
    out = out or results_folder() / "surfaces-v1.json"
    unknown = set(only.split(",")) - set(VARIANTS)
    if unknown:
        raise click.BadParameter(f"unknown: {', '.join(unknown)}; use {', '.join(VARIANTS)}", param_hint="--only")
    plan = TuningPlan(
        images=images,
        batch=batch,
        precision="bf16",
        loss_px=72,
        stages=(Stage(epochs=epochs, learning_rate=learning_rate),),
    )
    comparison = _comparison(checkpoint, out, plan, test_images)
    runs = itertools.product(map(int, seeds.split(",")), only.split(","))
    missing = [(name, seed) for seed, name in runs if comparison.lacks(VARIANTS[name], seed)]
    for name, seed, entry in _measured(missing, jobs, (checkpoint, out, plan, test_images), comparison):
        comparison.add(VARIANTS[name], seed, entry)
        click.echo(f"{name}, seed {seed}", err=True)
    click.echo(markdown(comparison.results))
    click.echo(claims(comparison.results))
    draw_world(HERE.parent / "docs" / "surfaces.jpg")
    draw_tuning(comparison.results, out.with_name(f"{out.stem}-tuning.png"))
    draw_ablation(comparison.results, out.with_name(f"{out.stem}-ablation.png"))
    if all(comparison.has_prompts(VARIANTS[name], 0) for name in FIVE):
        draw_maps(comparison, out.with_name(f"{out.stem}-maps.png"))
    else:
        click.echo(
            "the figure of maps is left as it is: the tuned prompts are not here, and are not versioned", err=True
        )


def _comparison(checkpoint: Path | None, out: Path, plan: TuningPlan, test_images: int) -> Comparison:
    clip = load_clip("surface-tiny", pretrained=None if checkpoint else "surfaces-v1", checkpoint=checkpoint)
    return Comparison(clip, out, plan, test_images)


def _measured(
    runs: Sequence[tuple[str, int]], jobs: int, settings: tuple[Any, ...], comparison: Comparison
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, seed, entry) of every run, as they end."""
    if jobs == 1:
        for name, seed in runs:
            yield name, seed, comparison.measure(VARIANTS[name], seed)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # Spawned: a forked process inherits torch's threads, and hangs.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (threads, *settings)) as pool:
        tasks = {pool.submit(_measured_here, *run): run for run in runs}
        for task in as_completed(tasks):
            yield *tasks[task], task.result()


_mine: Comparison  # of a worker process


def _start_worker(threads: int, *settings: Any) -> None:
    global _mine
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    _mine = _comparison(*settings)


def _measured_here(name: str, seed: int) -> dict[str, Any]:
    return _mine.measure(VARIANTS[name], seed)


if __name__ == "__main__":
    main()

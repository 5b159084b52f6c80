"""The comparison of surfaces-v1, as a table, a JSON and two figures.

python benchmarks/surfaces_v1.py    # three seeds; goes on where it was stopped
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from dapo_edge.config import Stage, TuningPlan
from dapo_edge.device import this_device
from dapo_edge.evaluation.comparison import VARIANTS, Comparison, claims, markdown
from dapo_edge.evaluation.figures import FIVE, draw_ablation, draw_maps, draw_world
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
    out: Path | None,
) -> None:
    """Run what is missing, then print the table."""
    device = this_device()
    folder = HERE / "results" / re.sub(r"[^a-z0-9]+", "-", f"{device.cpu} {device.cores} cores".lower()).strip("-")
    out = out or folder / "surfaces-v1.json"
    unknown = set(only.split(",")) - set(VARIANTS)
    if unknown:
        raise click.BadParameter(f"unknown: {', '.join(unknown)}; use {', '.join(VARIANTS)}", param_hint="--only")
    clip = load_clip("surface-tiny", pretrained=None if checkpoint else "surfaces-v1", checkpoint=checkpoint)
    plan = TuningPlan(
        images=images,
        batch=batch,
        precision="bf16",
        loss_px=clip.image_size // 2,
        stages=(Stage(epochs=epochs, learning_rate=learning_rate),),
    )
    comparison = Comparison(clip, out, plan, test_images)
    for seed in map(int, seeds.split(",")):
        for name in only.split(","):
            comparison.run(VARIANTS[name], seed)
            click.echo(f"{name}, seed {seed}", err=True)
    click.echo(markdown(comparison.results))
    click.echo(claims(comparison.results))
    draw_world(HERE.parent / "docs" / "surfaces.jpg")
    draw_ablation(comparison.results, out.with_name(f"{out.stem}-ablation.png"))
    if all(comparison.has_prompts(VARIANTS[name], 0) for name in FIVE):
        draw_maps(comparison, out.with_name(f"{out.stem}-maps.png"))
    else:
        click.echo(
            "the figure of maps is left as it is: the tuned prompts are not here, and are not versioned", err=True
        )


if __name__ == "__main__":
    main()

"""`dapo-edge compile`: a package's encoder as a TensorRT plan for this device."""

from __future__ import annotations

from pathlib import Path

import click

from dapo_edge.terminal import PACKAGE_PATH, PRECISION, as_json, print_json, progress_bar, say


@click.command("compile")
@click.argument("package", type=PACKAGE_PATH)
@click.option("--precision", type=PRECISION, help="Of the plan. [the package's own]")
@click.option(
    "--workspace-mb", type=click.IntRange(min=1), help="Scratch memory that one layer of the plan may use. [any]"
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="0 builds fastest, 5 looks longest for the fastest plan.",
)
@as_json
def compile_(
    package: Path, precision: str | None, workspace_mb: int | None, optimization_level: int, json_output: bool
) -> None:
    """Compile PACKAGE for this device's GPU with TensorRT, and judge the result by the package's own reference.

    The plan goes into PACKAGE/targets/ and runs with --backend tensorrt. It takes minutes, once per device.
    """
    from dapo_edge.backends.tensorrt_compile import compile_package
    from dapo_edge.package import EnginePackage

    opened = EnginePackage.open(package)
    with progress_bar() as progress:
        compiled = compile_package(
            opened,
            precision=precision,
            workspace_bytes=None if workspace_mb is None else workspace_mb << 20,
            optimization_level=optimization_level,
            on_progress=progress,
        )
    target = compiled.target
    if json_output:
        print_json({"schema": "dapo-edge compile 1", "folder": str(compiled.folder), **target.model_dump(mode="json")})
        return
    attention = target.attention
    say(
        f"attention fused: {attention.fused}/{attention.of}"
        if attention.known
        else "attention fused: this TensorRT does not tell"
    )
    drift = target.gate
    say(
        f"against eager torch: map difference {drift['map_difference_max']:.2g}, "
        f"types {drift['type_agreement']:.2%} equal, encoder {drift['encode_ms']:.2f} ms"
    )
    say(f"compiled in {target.seconds:.0f} s: {compiled.folder}")

"""Engine packages with other numbers."""

from __future__ import annotations

import json
from pathlib import Path

from dapo_edge.package import ENCODER_INT8, QUANTIZATION, REPORT, EnginePackage, PackageWriter


def with_batch(package: EnginePackage, batch: int, folder: Path) -> EnginePackage:
    """The same package with an encoder of another batch size."""
    from dapo_edge.config import parse_recipe
    from dapo_edge.engine.build import build

    return build(parse_recipe({**package.manifest.recipe, "batch": batch}), folder / "batch.dapo")


def with_int8(package: EnginePackage, folder: Path, kept: tuple[str, ...] = ()) -> EnginePackage:
    """The same package with an INT8 encoder: every Linear but the kept ones, by the ranges of its reference."""
    from dapo_edge.backends.onnx_graph import read_plain
    from dapo_edge.backends.onnx_linears import find_linears, weights_digest
    from dapo_edge.backends.onnx_quantized import for_cpu
    from dapo_edge.quantization import Quantization

    encoder, reference = package.encoder_bytes(), package.reference()
    assert reference is not None
    graph = read_plain(encoder)
    makers = {name: node for node in graph.nodes for name in node.output}
    ranges = {}
    for linear in find_linears(graph):
        source = linear.input
        while source not in reference.ranges:  # what is only reshaped is not measured again
            source = makers[source].input[0]
        ranges[linear.name] = reference.ranges[source]
    quantization = Quantization(ranges, {}, {}, weights_digest(graph)).without(dict.fromkeys(kept, "for a test"))
    with PackageWriter(folder / "int8.dapo") as writer:
        for name in package.manifest.files:
            writer.write(name, (package.path / name).read_bytes())
        writer.write(ENCODER_INT8, for_cpu(encoder, quantization))
        writer.write(QUANTIZATION, quantization.to_bytes())
        done = {"map_difference_mean": 0.05, "map_difference_max": 0.3}  # far more than it does: no test is about that
        writer.write(REPORT, json.dumps({**package.report(), "quantization": {"on_reference": done}}).encode())
        fields = package.manifest.model_dump(exclude={"format", "files"})
        return writer.commit({**fields, "precision": "int8"})

"""Write a method's image encoder as a portable ONNX file: static shapes, opset 18, nothing a compiler can't fuse."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import cast

import torch

from dapo_edge.errors import BackendError, RecipeError
from dapo_edge.extras import require
from dapo_edge.models.method import Method

OPSET = 18
INPUT, OUTPUTS = "image", ("patch_tokens", "image_embedding")
MAX_BYTES = 2_000_000_000  # a protobuf message can't hold more; larger encoders would need external data


def export_encoder(method: Method, path: Path, batch: int = 1) -> None:
    """Export image [B, 3, S, S] → patch_tokens [B, L, N, D], image_embedding [B, D], all float32; then check the graph.

    Raises `RecipeError` for an encoder above 2 GB and `BackendError` when the graph is not what it must be.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in method.encoder_tensors())
    if weights > MAX_BYTES:
        raise RecipeError(
            f"the image encoder of {method.clip.name} has {weights / 1e9:.1f} GB of weights, ONNX files hold 2 GB",
            "Use a smaller backbone, at most ViT-L",
        )
    image = torch.zeros(batch, 3, method.image_size, method.image_size)
    with torch.no_grad(), warnings.catch_warnings():
        # The tracing exporter is announced as legacy, and remarks on shapes, which are meant to be constants here.
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(
                cast(torch.nn.Module, method),
                (image,),
                str(path),
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamo=False,
            )
        finally:
            logging.disable(previous)
    _check_graph(method, path, batch)


def _check_graph(method: Method, path: Path, batch: int) -> None:
    onnx = require("onnx")
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    rows, columns = method.grid
    dimensions = method.clip.dimensions
    expected = {
        INPUT: [batch, 3, method.image_size, method.image_size],
        OUTPUTS[0]: [batch, len(method.feature_layers), rows * columns, dimensions],
        OUTPUTS[1]: [batch, dimensions],
    }
    found = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    if found != expected:
        raise BackendError(f"the exported encoder has inputs and outputs {found} instead of {expected}", _REPORT)
    operators = Counter(node.op_type for node in model.graph.node)
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in method.clip.visual.modules())
    if operators["LayerNormalization"] != norms or operators["ReduceMean"]:
        # A decomposed LayerNorm overflows silently in FP16.
        raise BackendError(
            f"the exported encoder has {operators['LayerNormalization']} LayerNormalization operators, not {norms}",
            _REPORT,
        )


_REPORT = "This torch exports differently; install the torch of constraints.txt"

"""Write a ViT-L/14 with seeded weights for `gpu.py --encoder`: encoder.onnx, and what eager torch makes of a few views.

    python benchmarks/gpu_encoder.py DIR

An encoder's time doesn't depend on its weights, and a GPU machine may have neither pretrained ones nor open_clip. It
needs torch, onnx and onnxruntime, minutes and 1.2 GB. FP32, on the GPU where torch sees one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the machine may have no install
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "gpu"))  # the kernels with their memory

import checks
import numpy as np
import torch
from gpu_measure import EncoderShape
from gpu_peers import Encoder
from numpy.typing import NDArray
from works import MEAN, STD

from dapo_edge.backends.onnx_flavours import measured_tensors
from dapo_edge.engine.range_probe import probed

VIEWS = 4


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder, EncoderShape())


@torch.inference_mode()
def write(folder: Path, shape: EncoderShape) -> None:
    """Export an encoder of this shape at batch 1, and record views, tokens and embeddings beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    size = shape.image_size
    views = np.stack(
        [np.ascontiguousarray(checks.random_view("BGR8", (size, size), seed).rgb()[..., ::-1]) for seed in range(VIEWS)]
    )
    model = Encoder(shape).eval()
    export(model, folder / "encoder.onnx", size)
    model.to(place)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = [(torch.from_numpy(view[..., ::-1].copy()).permute(2, 0, 1) / 255 - mean) / std for view in views]
    outputs = [[part.cpu().numpy() for part in model(image[None].to(place))] for image in images]
    np.savez(
        folder / "reference.npz",
        views=views,
        tokens=np.concatenate([tokens for tokens, _ in outputs]).astype(np.float16),
        embeddings=np.concatenate([embedding for _, embedding in outputs]),
        ranges=json.dumps(ranges(folder / "encoder.onnx", [image[None].numpy() for image in images])),
    )
    print(f"written: {folder}", file=sys.stderr)


def export(model: torch.nn.Module, path: Path, size: int) -> None:
    """Static shapes, opset 18, as packages have them."""
    with warnings.catch_warnings():  # the tracing exporter is announced as legacy
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(
                model,
                (torch.zeros(1, 3, size, size),),
                str(path),
                opset_version=18,
                input_names=["image"],
                output_names=["patch_tokens", "image_embedding"],
                dynamo=False,
            )
        finally:
            logging.disable(logging.NOTSET)


def ranges(path: Path, images: list[NDArray[np.float32]]) -> dict[str, float]:
    """Largest |value| by tensor, as a built package has them: they decide what FP16 can't hold."""
    import onnxruntime

    encoder = path.read_bytes()
    names = measured_tensors(encoder)
    session = onnxruntime.InferenceSession(probed(encoder, names), providers=["CPUExecutionProvider"])
    found = np.asarray([session.run(None, {"image": image}) for image in images], np.float64)  # [F, 2 · names]
    if not np.isfinite(found).all():
        raise SystemExit("the seeded encoder overflows in FP32")
    return dict(zip(names, found[:, ::2].max(axis=0).tolist(), strict=True))


if __name__ == "__main__":
    main()

"""The torch part of the GPU benchmark: encoder and usual pre- and post-processing, eager, as a CUDA graph, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checks  # of tests/gpu
import numpy as np
import torch
from gpu_measure import Bench, Effort, Workload, gpu_us
from gpu_peers import Encoder, usual_postprocess, usual_preprocess
from torch import Tensor
from works import MEAN, STD

from dapo_edge.kernels import reference

FP16_MIN_COSINE = 0.99
COMPILED_MIN_COSINE = 0.999
PEER_ANOMALY = 0.02  # FP16 logits of the usual way, divided by a temperature of 0.07
PEER_GREY_MEAN = 0.5


@torch.inference_mode()
def torch_part(machine: Bench, workload: Workload, effort: Effort) -> dict[str, Any]:
    """Encoder at batch 1, and the usual way around it at every batch size."""
    torch.backends.cudnn.allow_tf32 = False  # FP32 is what the rest is compared with
    return {
        "version": torch.__version__,
        "encoder": encoder(machine, workload, effort),
        "usual": {str(batch): usual(machine, workload, effort, batch) for batch in workload.batches},
    }


def encoder(machine: Bench, workload: Workload, effort: Effort) -> dict[str, Any]:
    """A ViT with seeded weights at batch 1: its time doesn't depend on the weights."""
    place, dtype = machine.torch_device, _dtype(machine)
    size = workload.encoder.image_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(place)
    exact = Encoder(workload.encoder).eval().to(place)
    expected = exact(image)
    model = exact.to(dtype)  # in place: the FP32 weights are gone
    image = image.to(dtype)
    measured: dict[str, Any] = {"runs_as": str(dtype).removeprefix("torch."), "batch": 1}
    measured["cosine_to_fp32"] = _checked("FP16", model(image), expected, FP16_MIN_COSINE)
    samples = effort.encoder_samples
    measured["eager"] = {"us": gpu_us(machine, lambda: model(image), effort, samples)}
    measured["eager_graph"] = {"us": gpu_us(machine, machine.capture(lambda: model(image)), effort, samples)}
    if not effort.with_compile:
        return {**measured, "compile": {"skipped": "--quick"}}
    eager = [output.clone() for output in model(image)]
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    cosine = _checked("torch.compile", compiled(image), eager, COMPILED_MIN_COSINE)
    us = gpu_us(machine, lambda: compiled(image), effort, samples)
    return {**measured, "compile": {"mode": "max-autotune", "cosine_to_eager": cosine, "us": us}}


def usual(machine: Bench, workload: Workload, effort: Effort, batch: int) -> dict[str, Any]:
    """Pre- and post-processing as people write them, on the same frames and tokens as the kernels."""
    prepare, process = _usual_works(machine, workload, batch)
    checked = {"grey_levels_mean": _check_prepared(prepare(), workload)}
    checked["anomaly"] = _check_maps(process(), workload, batch)
    measured: dict[str, Any] = {"checked": checked}
    ways: list[tuple[str, Callable[[], Any]]] = [("preprocess", prepare), ("postprocess", process)]
    for name, work in ways:
        measured[name] = {
            "eager": {"us": gpu_us(machine, work, effort, effort.encoder_samples)},
            "eager_graph": {"us": gpu_us(machine, machine.capture(work), effort, effort.encoder_samples)},
        }
        if effort.with_compile:
            # Captured by hand: torch's own graphs would copy the frames or tokens first, at every call.
            compiled = machine.capture(torch.compile(work, mode="max-autotune-no-cudagraphs", fullgraph=True))
            measured[name]["compile"] = {"us": gpu_us(machine, compiled, effort, effort.encoder_samples)}
    return measured


def _usual_works(
    machine: Bench, workload: Workload, batch: int
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, Tensor]]]:
    place, dtype, spec = machine.torch_device, _dtype(machine), workload.spec
    width, height = workload.frame
    views = [checks.random_view("BGR8", workload.frame, seed=index) for index in range(batch)]
    pictures = [view.data[:, : 3 * width].reshape(height, width, 3) for view in views]
    frames = torch.from_numpy(np.stack(pictures)).to(place)
    mean, std = (torch.tensor(values, dtype=dtype, device=place) for values in (MEAN, STD))
    tokens = torch.from_numpy(checks.random_tokens(workload.tokens(batch))).to(place, dtype)
    rows = checks.random_bank(workload.types, workload.encoder.dimensions)
    bank = torch.from_numpy(rows).to(place, dtype)
    size = workload.encoder.image_size

    def prepare() -> Tensor:
        return usual_preprocess(frames, size, mean, std)

    def process() -> tuple[Tensor, Tensor]:
        return usual_postprocess(tokens, bank, spec.temperature, spec.grid, (size, size), spec.smoothing_px)

    return prepare, process


def _check_prepared(images: Tensor, workload: Workload) -> float:
    """Mean difference from Pillow in grey levels. Raises `SystemExit` beyond the bound."""
    view = checks.random_view("BGR8", workload.frame, seed=0)
    _, mean = checks.pillow_difference(images[0].float().cpu().numpy(), view)
    if not mean <= PEER_GREY_MEAN:
        raise SystemExit(f"the usual preprocessing is wrong, by {mean} grey levels on average")
    return mean


def _check_maps(result: tuple[Tensor, Tensor], workload: Workload, batch: int) -> float:
    """Largest difference from the reference, away from the border. Raises `SystemExit` beyond the bound."""
    anomaly, _ = result
    spec, size = workload.spec, workload.encoder.image_size
    tokens = checks.random_tokens(workload.tokens(batch))[:1].astype(np.float32)
    rows = checks.random_bank(workload.types, workload.encoder.dimensions)
    probs = reference.patch_probabilities(tokens, rows, spec.temperature, spec.grid)
    expected = reference.anomaly_map(probs, *spec.tables((size, size)))[0]
    border = int(4 * spec.smoothing_px + 0.5)
    inside = slice(border, size - border)
    difference = float(np.abs(anomaly[0].float().cpu().numpy() - expected)[inside, inside].max())
    if not difference <= PEER_ANOMALY:
        raise SystemExit(f"the usual postprocessing is wrong, by {difference}")
    return difference


def _checked(what: str, found: Any, expected: Any, lowest: float) -> float:
    """The lowest cosine of patch tokens and image embedding. Raises `SystemExit` below `lowest`."""
    cosine = min(
        float(torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1).min())
        for one, other in zip(found, expected, strict=True)
    )
    if not cosine >= lowest:
        raise SystemExit(f"the encoder by {what} is wrong: cosine {cosine}, nothing of it was timed")
    return cosine


def _dtype(machine: Bench) -> torch.dtype:
    """FP16, for which a CPU has no kernels in many operators."""
    return torch.float32 if machine.torch_device == "cpu" else torch.float16

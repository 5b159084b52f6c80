"""The torch part of the GPU benchmark: encoder and usual pre- and post-processing, eager, as a CUDA graph, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checks  # of tests/gpu
import numpy as np
import torch
from driver import Work
from gpu_measure import Bench, Effort, Steps, Workload, cold_us, gpu_us
from gpu_peers import Encoder, usual_postprocess, usual_preprocess
from torch import Tensor
from works import MEAN, STD

from dapo_edge.kernels import reference

FP16_MIN_COSINE = 0.99
COMPILED_MIN_COSINE = 0.999
PEER_ANOMALY = 0.02  # FP16 logits of the usual way, divided by a temperature of 0.07
PEER_GREY_MEAN = 0.5


AS_GRAPH = "as a CUDA graph: the eager number to compare with"
AS_LAUNCHES = "launch by launch: the GPU may wait for the host in between"


@torch.inference_mode()
def torch_part(machine: Bench, workload: Workload, effort: Effort) -> Steps:
    """Eager: the encoder at batch 1, and the usual way around it at every batch size."""
    yield {"version": torch.__version__, "encoder": encoder(machine, workload, effort)}
    usual_ones: dict[str, Any] = {}
    for batch in workload.batches:
        usual_ones[str(batch)] = usual(machine, workload, effort, batch)
        yield {"usual": usual_ones}


@torch.inference_mode()
def compile_part(machine: Bench, workload: Workload, effort: Effort) -> Steps:
    """The same by torch.compile, which searches for minutes."""
    yield {"version": torch.__version__, "encoder": compiled_encoder(machine, workload, effort)}
    usual_ones: dict[str, Any] = {}
    for batch in workload.batches:
        usual_ones[str(batch)] = compiled_usual(machine, workload, effort, batch)
        yield {"usual": usual_ones}


def encoder(machine: Bench, workload: Workload, effort: Effort) -> dict[str, Any]:
    """A ViT with seeded weights at batch 1: its time doesn't depend on the weights. Those alone are beyond any L2."""
    model, image, described = _encoder_work(machine, workload)
    return {**described, **_eager(machine, lambda: model(image), effort, gpu_us)}


def compiled_encoder(machine: Bench, workload: Workload, effort: Effort) -> dict[str, Any]:
    """The same ViT by torch.compile, which makes CUDA graphs by itself in this mode."""
    model, image, described = _encoder_work(machine, workload)
    eager = [output.clone() for output in model(image)]
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    cosine = _checked("torch.compile", compiled(image), eager, COMPILED_MIN_COSINE)
    us = gpu_us(machine, lambda: compiled(image), effort, effort.encoder_samples)
    return {**described, "mode": "max-autotune", "cosine_to_eager": cosine, "us": us}


def usual(machine: Bench, workload: Workload, effort: Effort, batch: int) -> dict[str, Any]:
    """Pre- and post-processing as people write them, on the same frames and tokens as the kernels."""
    prepare, process = _usual_works(machine, workload, batch)
    measured: dict[str, Any] = {"checked": _check_usual(prepare(), process(), workload)}
    ways: list[tuple[str, Callable[[], Any]]] = [("preprocess", prepare), ("postprocess", process)]
    for name, work in ways:
        measured[name] = _eager(machine, work, effort, _warm_and_cold)
    return measured


def compiled_usual(machine: Bench, workload: Workload, effort: Effort, batch: int) -> dict[str, Any]:
    """The same pre- and post-processing by torch.compile."""
    prepare, process = _usual_works(machine, workload, batch)
    # Captured by hand: torch's own graphs would copy the frames or tokens first, at every call.
    mode = "max-autotune-no-cudagraphs"
    ways: dict[str, Any] = {
        "preprocess": torch.compile(prepare, mode=mode, fullgraph=True),
        "postprocess": torch.compile(process, mode=mode, fullgraph=True),
    }
    checked = _check_usual(ways["preprocess"](), ways["postprocess"](), workload)
    measured: dict[str, Any] = {"mode": mode, "checked": checked}
    for name, work in ways.items():
        measured[name] = {"us": _warm_and_cold(machine, machine.capture(work), effort, effort.encoder_samples)}
    return measured


def _encoder_work(machine: Bench, workload: Workload) -> tuple[Encoder, Tensor, dict[str, Any]]:
    """The encoder in the type that it runs as, its input, and how far it is from FP32."""
    torch.backends.cudnn.allow_tf32 = False  # FP32 is what the rest is compared with
    place, dtype, size = machine.torch_device, _dtype(machine), workload.encoder.image_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(place)
    exact = Encoder(workload.encoder).eval().to(place)
    expected = exact(image)
    model = exact.to(dtype)  # in place: the FP32 weights are gone
    image = image.to(dtype)
    cosine = _checked("FP16", model(image), expected, FP16_MIN_COSINE)
    return model, image, {"runs_as": str(dtype).removeprefix("torch."), "batch": 1, "cosine_to_fp32": cosine}


def _eager(
    machine: Bench, work: Callable[[], Any], effort: Effort, measure: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """`eager` doesn't count what Python takes to launch; `eager_launched` is what a plain loop gets."""
    samples = effort.encoder_samples
    return {
        "eager": {"runs": AS_GRAPH, "us": measure(machine, machine.capture(work), effort, samples)},
        "eager_launched": {"runs": AS_LAUNCHES, "us": gpu_us(machine, work, effort, samples)},
    }


def _warm_and_cold(machine: Bench, replay: Work, effort: Effort, samples: int) -> dict[str, Any]:
    return {
        "warm": gpu_us(machine, replay, effort, samples),
        "cold": cold_us(machine, replay, effort, samples),
    }


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


def _check_usual(images: Tensor, maps: tuple[Tensor, Tensor], workload: Workload) -> dict[str, float]:
    return {"grey_levels_mean": _check_prepared(images, workload), "anomaly": _check_maps(maps, workload)}


def _check_prepared(images: Tensor, workload: Workload) -> float:
    """Mean difference from Pillow in grey levels. Raises `SystemExit` beyond the bound."""
    view = checks.random_view("BGR8", workload.frame, seed=0)
    _, mean = checks.pillow_difference(images[0].float().cpu().numpy(), view)
    if not mean <= PEER_GREY_MEAN:
        raise SystemExit(f"the usual preprocessing is wrong, by {mean} grey levels on average")
    return mean


def _check_maps(result: tuple[Tensor, Tensor], workload: Workload) -> float:
    """Largest difference from the reference, away from the border. Raises `SystemExit` beyond the bound."""
    anomaly, _ = result
    spec, size = workload.spec, workload.encoder.image_size
    tokens = checks.random_tokens(workload.tokens(len(anomaly)))[:1].astype(np.float32)
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

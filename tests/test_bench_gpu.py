"""benchmarks/gpu.py without a GPU: its statistics, its file, its limits; and the torch peers compute the same."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import checks
import fake_cuda
import numpy as np
import pytest
import torch
from host_machine import HostMachine
from works import MEAN, STD

from dapo_edge.errors import DependencyMissing
from dapo_edge.kernels import reference
from dapo_edge.kernels.compile import Cubin, source_digest
from dapo_edge.kernels.launch import Launch
from dapo_edge.kernels.map_spec import MapSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu
import gpu_encoder
import gpu_measure
import gpu_torch
from gpu_measure import QUICK, EncoderShape, Workload, cold_us, series
from gpu_peers import Block, Encoder, usual_postprocess, usual_preprocess
from gpu_results import Results, limits

SHAPE = EncoderShape(image_size=56, patch=14, width=64, heads=4, blocks=4, taps=(2, 4), dimensions=48, prompts=2)
TINY = Workload(frame=(96, 64), encoder=SHAPE, types=3, smoothing_px=1.0, batches=(1, 16))


@pytest.fixture(autouse=True)
def _seconds_become_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = dataclasses.replace(QUICK, warmup_s=0, copy_bytes=1 << 16, samples=4, inner=2, encoder_samples=3, frames=5)
    monkeypatch.setattr(gpu, "QUICK", quick)


def test_a_run_writes_what_it_measured(tmp_path: Path) -> None:
    result = gpu.main(["--quick", "--out", str(tmp_path)], HostMachine(), TINY)
    assert json.loads((tmp_path / "gpu-quick.json").read_text()) == result
    assert (result["schema"], result["gpu"]) == ("dapo-edge gpu 1", "Emulated GPU")
    assert set(result["parts"]) == {"kernels", "torch"}
    for part in result["parts"].values():
        assert part["command"] == f"python benchmarks/gpu.py --quick --out {tmp_path}"
        assert part["date"].endswith("+00:00")
        assert part["device"]["packages"]["numpy"] == np.__version__
        assert set(part["nvidia_smi"]) == {"before", "after"}
        assert part["finished"] is True
    kernels = result["parts"]["kernels"]
    for batch, measured in kernels["batch"].items():
        for name in ("preprocess", "patch_probabilities", "defect_map", "tokens_to_map", "graph"):
            for cache in ("warm", "cold"):
                one = measured[name][cache]
                us = one["us"]
                assert us["n"] == 4
                assert us["min"] <= us["median"] <= us["p95"] <= us["p99"] <= us["max"]
                assert us["warmup"].endswith("L2 flushed before each sample") == (cache == "cold")
                assert one["gb_per_s"] == pytest.approx(measured[name]["bytes"] / us["median"] / 1e3)
                assert one["share_of_copy"] == pytest.approx(one["gb_per_s"] / kernels["copy"]["gb_per_s"])
        both = measured["patch_probabilities"]["bytes"] + measured["defect_map"]["bytes"]
        assert measured["tokens_to_map"]["bytes"] == both
        assert measured["graph"]["bytes"] == both + measured["preprocess"]["bytes"]
        assert measured["preprocess"]["bytes"] == int(batch) * (96 * 64 * 3 + 3 * 56 * 56 * 2)
        assert measured["checked"]["probability"] <= checks.PROBABILITY
    encoder = result["parts"]["torch"]["encoder"]
    assert encoder["eager"]["us"]["n"] == 3
    assert encoder["eager"]["runs"] == gpu_torch.AS_GRAPH
    assert encoder["eager_launched"]["runs"] == gpu_torch.AS_LAUNCHES
    for usual in result["parts"]["torch"]["usual"].values():
        assert usual["postprocess"]["eager"]["us"]["cold"]["n"] == 3
    judged = result["limits"]
    graph = kernels["batch"]["1"]["graph"]
    assert judged[0]["measured"] == graph["cold"]["us"]["median"]
    assert judged[2]["measured"] == kernels["batch"]["16"]["tokens_to_map"]["cold"]["share_of_copy"]
    assert graph["warm"] != graph["cold"]
    unknown = [judged[place]["measured"] for place in (1, 3, 4, 5)]
    assert unknown == [None] * 4, "TensorRT was not there: a graph without an encoder says nothing of its launch"


def test_each_run_keeps_the_other_s_part(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Results(path, "One GPU").put("compile", {"encoder": {"us": {"median": 6000.0}}})
    result = Results(path, "One GPU").put("tensorrt", {"vit_l": {"encode_us": 2400.0}})
    assert set(result["parts"]) == {"compile", "tensorrt"}
    assert result["limits"][-1]["measured"] == 2.5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ['{"schema": "dapo-edge gpu 1", "gpu": "Another", "parts": {}}', "[]", '{"schem', ""])
def test_another_gpu_s_file_is_refused_before_anything_is_measured(text: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu-quick.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="of another GPU or format"):
        gpu.main(["--quick", "--out", str(tmp_path)], WrongMachine("preprocess"), TINY)
    assert path.read_text() == text


def test_what_was_measured_outlives_a_later_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_batch = gpu_torch.usual

    def fails(machine: Any, workload: Workload, effort: Any, batch: int) -> dict[str, Any]:
        if batch == 16:
            raise MemoryError
        return one_batch(machine, workload, effort, batch)

    monkeypatch.setattr(gpu_torch, "usual", fails)
    with pytest.raises(MemoryError):
        gpu.main(["--quick", "--out", str(tmp_path)], HostMachine(), TINY)
    parts = json.loads((tmp_path / "gpu-quick.json").read_text())["parts"]
    assert parts["kernels"]["finished"] is True
    assert parts["torch"]["finished"] is False
    assert set(parts["torch"]["usual"]) == {"1"}
    assert parts["torch"]["encoder"]["eager"]["us"]["n"] == 3


def test_a_part_grows_by_what_each_step_measured() -> None:
    found = list(gpu_measure.part("make it", iter([{"one": 1}, {"two": 2}])))
    assert [set(step) & {"one", "two"} for step in found] == [{"one"}, {"one", "two"}, {"one", "two"}]
    assert [step["finished"] for step in found] == [False, False, True]
    assert found[0]["command"] == "make it"


def test_the_cache_is_flushed_before_each_cold_sample_only() -> None:
    done: list[str] = []

    class Noted(HostMachine):
        def flush_work(self) -> Any:
            return lambda: done.append("flush")

    effort = dataclasses.replace(QUICK, warmup_s=0, samples=3)
    found = cold_us(Noted(), lambda: done.append("work"), effort)
    assert done == ["work"] * 3 + ["flush", "work"] * 3
    assert found["n"] == 3


def test_the_compiled_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def as_it_is(work: Any, mode: str, fullgraph: bool) -> Any:
        modes.append(mode)
        return work

    monkeypatch.setattr("torch.compile", as_it_is)
    result = gpu.main(["--quick", "--out", str(tmp_path), "--parts", "compile"], HostMachine(), TINY)
    assert set(result["parts"]) == {"compile"}
    found = result["parts"]["compile"]
    assert found["encoder"]["cosine_to_eager"] == pytest.approx(1)
    assert found["usual"]["16"]["preprocess"]["us"]["cold"]["n"] == 3
    assert found["usual"]["1"]["checked"]["anomaly"] <= gpu_torch.PEER_ANOMALY
    assert modes == ["max-autotune"] + ["max-autotune-no-cudagraphs"] * 4


def test_a_wrongly_compiled_peer_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(work: Any, mode: str, fullgraph: bool) -> Any:
        if isinstance(work, Encoder):
            return work
        return lambda: tuple(one / 2 for one in work()) if work.__name__ == "process" else work()

    monkeypatch.setattr("torch.compile", halved)
    with pytest.raises(SystemExit, match="the usual postprocessing is wrong"):
        gpu.main(["--quick", "--out", str(tmp_path), "--parts", "compile"], HostMachine(), TINY)
    assert set(json.loads((tmp_path / "gpu-quick.json").read_text())["parts"]["compile"]) >= {"encoder", "finished"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "kernels,tourch"], "there is no part 'tourch': take from kernels, torch, compile, tensorrt"),
        (["--parts", ""], "there is no part ''"),
        (["--parts", "kernels,tensorrt"], "need each other"),
        (["--parts", "kernels", "--package", "some.dapo"], "need each other"),
        (["--package", "some.dapo", "--encoder", "folder"], "not allowed with"),
    ],
    ids=str,
)
def test_parts_that_can_t_be_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*arguments, "--out", str(tmp_path)], HostMachine(), TINY)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_part_that_was_asked_for_is_not_left_out_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DependencyMissing, match="sees no GPU"):
        gpu.main(["--parts", "kernels", "--out", str(tmp_path)])
    monkeypatch.setattr("dapo_edge.device.gpus", list)
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main(["--parts", "tensorrt", "--package", "some.dapo", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("good", [True, False])
def test_limits_are_judged(good: bool) -> None:
    ours, host, share, trt = (99.0, 19.0, 0.6, 2500.0) if good else (150.0, 21.0, 0.4, 2700.0)
    other = {"us": {"median": 1000.0 if good else 1.0}, "share_of_copy": 0.1 if good else 0.9}
    batches = {
        "1": {"graph": {"cold": {"us": {"median": ours}}, "warm": other}, "graph_host": {"median": 1.0}},
        "16": {"tokens_to_map": {"cold": {"share_of_copy": share}, "warm": other}, "graph": {"cold": other}},
    }
    parts = {
        "kernels": {"batch": batches},
        "torch": {"encoder": {"eager": {"us": {"median": 5000.0}}, "eager_launched": {"us": {"median": 1.0}}}},
        "compile": {"encoder": {"us": {"median": 4000.0}}},
        "tensorrt": {"vit_l": {"encode_us": trt}, "graph_host": {"median": host}},
    }
    judged = limits(parts)
    assert [limit["holds"] for limit in judged] == [good] * 6
    assert [limit["measured"] for limit in judged[:4]] == [ours, ours / trt, share, host]
    assert all(limit["holds"] is None for limit in limits({}))
    assert all(limit["holds"] is None for limit in limits({"tensorrt": {"vit_l": None, "graph_host": None}}))


def test_what_only_tensorrt_can_tell_is_unknown_without_it() -> None:
    batches = {"1": {"graph": {"cold": {"us": {"median": 90.0}}}, "graph_host": {"median": 5.0}}}
    eager = {"encoder": {"eager": {"us": {"median": 3000.0}}}}
    judged = limits({"kernels": {"batch": batches}, "torch": eager})
    assert [limit["measured"] for limit in judged] == [90.0, None, None, None, None, None]
    judged = limits({"kernels": {"batch": batches}, "torch": eager, "compile": {"encoder": {"us": {"median": 4000.0}}}})
    assert judged[1]["measured"] == 90 / 3000, "the fastest of those that were measured"


def test_percentiles() -> None:
    found = series(range(1, 101), "3 calls")
    assert (found["n"], found["median"], found["min"], found["max"]) == (100, 50.5, 1, 100)
    assert found["p95"] == pytest.approx(95.05)
    assert found["p99"] == pytest.approx(99.01)


class WrongMachine(HostMachine):
    """One kernel leaves a wrong number."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel

    def start(self, launch: Launch, job: Any) -> None:
        super().start(launch, job)
        if launch.kernel.startswith(self._kernel):
            addresses = {"preprocess": "images", "patch": "probs", "defect": "types"}
            address = getattr(job, addresses[self._kernel])
            np.frombuffer((ctypes.c_ubyte * 1024).from_address(address), np.uint8)[64:] ^= 0x3F


@pytest.mark.parametrize("kernel", ["preprocess", "patch", "defect"])
def test_a_wrong_kernel_is_not_timed(kernel: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a kernel is wrong, nothing was timed"):
        gpu.main(["--quick", "--out", str(tmp_path)], WrongMachine(kernel), TINY)
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="nothing can be measured"):
        gpu.main(["--quick", "--out", str(tmp_path)])
    assert "sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_whole_backend_is_timed_around_a_seeded_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="the ranges of the seeded encoder need it")
    gpu_encoder.write(tmp_path / "encoder", SHAPE)
    fake_cuda.install(monkeypatch, fake_cuda.FakeGpu())
    cubin = Cubin(fake_cuda.CUBIN, "sm_90", "nvcc 12.6", source_digest(), {}, ())
    monkeypatch.setattr("dapo_edge.backends.tensorrt_compile.compile_kernels", lambda *_, **__: cubin)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--quick", "--out", str(tmp_path), "--encoder", str(tmp_path / "encoder")]
    result = gpu.main(arguments, None, TINY)
    assert result["gpu"] == "NVIDIA H200"
    part = result["parts"]["tensorrt"]
    assert part["checked"]["anomaly"] <= part["checked"]["limit"]
    assert set(part["stages_ms"]) == {"upload", "preprocess", "encode", "map", "download"}
    assert part["stages_ms"]["encode"]["n"] == part["total_ms"]["n"] == 5
    assert part["graph_host"]["n"] == 4
    assert part["target"]["gate"]["token_cosine_min"] > 0.999
    assert part["vit_l"] is None, "a small encoder doesn't stand for ViT-L"


@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
def test_the_usual_postprocessing_is_the_reference(sigma: float) -> None:
    spec = MapSpec(60, (5, 6), 0.07, True, sigma, "image")
    tokens, rows = checks.random_tokens((2, 3, 30, 16)).astype(np.float32), checks.random_bank(4, 16)
    anomaly, types = usual_postprocess(
        torch.from_numpy(tokens), torch.from_numpy(rows), spec.temperature, spec.grid, (60, 60), sigma
    )
    probs = reference.patch_probabilities(tokens, rows, spec.temperature, spec.grid)
    expected = reference.defect_map(probs, *spec.tables((60, 60)))
    border = int(4 * sigma + 0.5)
    inside = (slice(None), slice(border, 60 - border), slice(border, 60 - border))
    np.testing.assert_allclose(anomaly.float().numpy()[inside], expected.anomaly[inside], atol=1e-3)
    assert (types.numpy()[inside] == expected.types[inside]).mean() >= 0.999


@pytest.mark.parametrize("size", [(96, 64), (31, 40)], ids=str)
def test_the_usual_preprocessing_is_pillow_s(size: tuple[int, int]) -> None:
    view = checks.random_view("BGR8", size)
    frame = np.ascontiguousarray(view.rgb()[None, ..., ::-1])
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    images = usual_preprocess(torch.from_numpy(frame), 28, mean, std)
    largest, average = checks.pillow_difference(images[0].numpy(), view)
    assert average <= checks.GREY_MEAN
    assert largest <= 20, "torch rounds once and clips once, Pillow after each axis"


@torch.inference_mode()
def test_the_encoder_is_a_vit_of_the_asked_shape() -> None:
    model = Encoder(SHAPE).eval()
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    tokens, embedding = model(torch.randn(2, 3, 56, 56))
    assert tokens.shape == (2, 2, 16, 48)
    assert embedding.shape == (2, 48)
    assert all(output.shape == (2, 1 + 16 + 2, 64) for output in outputs)
    torch.testing.assert_close(tokens[:, 1], model.adapters[1](outputs[3][:, 1:17]))
    torch.testing.assert_close(embedding, model.project(model.norm_out(outputs[3][:, 0])))


@torch.inference_mode()
def test_a_block_is_torch_s_own_attention() -> None:
    torch.manual_seed(1)
    block, x = Block(64, 4).eval(), torch.randn(2, 9, 64)
    usual = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
    usual.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.out.weight,
            "out_proj.bias": block.out.bias,
        }
    )
    normed = block.norm_1(x)
    middle = x + usual(normed, normed, normed)[0]
    hidden = block.up(block.norm_2(middle))
    torch.testing.assert_close(block(x), middle + block.down(hidden / (1 + torch.exp(-1.702 * hidden))))


def test_the_released_configuration_is_the_default() -> None:
    workload = Workload()
    assert workload.tokens(16) == (16, 4, 1369, 768)
    assert (workload.frame, workload.types, workload.encoder.image_size) == ((1920, 1080), 20, 518)
    parameters = sum(tensor.numel() for tensor in _on_meta(workload.encoder).parameters())
    assert parameters == pytest.approx(304e6, rel=0.02), "ViT-L has 304 million weights, the adapters a few more"


def _on_meta(shape: EncoderShape) -> Encoder:
    with torch.device("meta"):
        return Encoder(shape)

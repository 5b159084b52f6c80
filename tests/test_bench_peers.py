"""benchmarks/peers.py: every contender computes the same, who does not is not timed, and all take turns."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import sharp_bank
from torch._inductor import config as inductor

from dapo_edge.config import Recipe
from dapo_edge.errors import BackendError, DependencyMissing, RecipeError
from dapo_edge.models.eager import EagerBackend
from dapo_edge.package import EnginePackage

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peer_contenders
import peer_gpu
import peer_models
import peer_process
import peer_results
import peer_worker
import peers
from peer_contenders import CONFIGURATIONS, CONTENDERS, Configuration, contenders_for, package_of, write_inputs
from peer_results import bound_of, difference
from peer_spec import Loaded, Spec
from usual import Usual

BENCHMARKS = Path(peers.__file__).parent


@pytest.fixture(scope="module")
def inputs(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pictures, and a bank with contrast."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(package, folder, (160, 120))
    return folder


@pytest.fixture
def spec_for(package: EnginePackage, inputs: Path, tmp_path: Path) -> Callable[..., Spec]:
    def made(loader: str, precision: str = "fp32") -> Spec:
        bank, frames = str(inputs / "bank.safetensors"), str(inputs / "frames.npz")
        return Spec(loader, precision, str(package.path), bank, frames, str(tmp_path), threads=1)

    return made


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loader_module(monkeypatch: pytest.MonkeyPatch, load: Callable[[Spec], Loaded]) -> str:
    module = types.ModuleType("contender_of_a_test")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:load"


def maps_of(loaded: Loaded, inputs: Path) -> dict[str, Any]:
    frames = np.load(inputs / "frames.npz")["raw"]
    found = [loaded.inspect(frame) for frame in frames]
    return {"anomaly": np.stack([one for one, _ in found]), "types": np.stack([one for _, one in found])}


# --- what everyone computes


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_the_usual_pipeline_is_the_eager_reference(package: EnginePackage, sigma: float) -> None:
    spec = package.manifest.map.__class__(**{**package.manifest.map.__dict__, "smoothing_px": sigma})
    manifest, bank = package.manifest.model_copy(update={"map": spec}), sharp_bank(package)
    eager = EagerBackend.open(package, map_size="model")
    eager._spec = spec
    eager.set_bank(bank)
    view = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)  # the model's size: nobody resizes
    anomaly, kinds = Usual(manifest, bank).around(lambda image: eager.method(image)[0])(view)
    expected = eager.infer([view])
    assert np.abs(anomaly - expected.anomaly[0]).max() < 2e-5
    assert (kinds == expected.types[0]).mean() > 0.999
    assert np.ptp(anomaly) > 0.1, "flat maps agree with anything"


@pytest.mark.parametrize(
    ("loader", "precision", "runs_as"),
    [
        ("peer_models:eager", "bf16", "bf16"),
        ("peer_models:compiled", "fp32", "fp32"),
        ("peer_models:onnxruntime", "fp32", "fp32"),
        ("peer_models:onnxruntime", "int8-dynamic", "int8"),
        ("peer_models:openvino", "its own choice", None),
        ("peer_models:ours", "fp32", "fp32"),
        ("peer_gpu:eager", "fp16", "fp32"),
    ],
)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of the contenders' own libraries
def test_contenders_compute_what_eager_torch_does(
    loader: str,
    precision: str,
    runs_as: str | None,
    inputs: Path,
    package: EnginePackage,
    spec_for: Callable[..., Spec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "onnxruntime" in loader:
        pytest.importorskip("onnxruntime", reason="pip install 'dapo-edge[peers]'")
    monkeypatch.setattr("torch.compile", lambda model: model)  # half a minute of a C++ compiler
    monkeypatch.setattr(peer_gpu, "_place", lambda: "cpu")
    module, function = loader.split(":")
    with inductor.patch(freezing=False):  # the loader sets it for its own process
        load = getattr({"peer_models": peer_models, "peer_gpu": peer_gpu}[module], function)
        loaded = load(spec_for(loader, precision))
    expected = maps_of(peer_models.eager(spec_for("peer_models:eager")), inputs)
    # torch's own border on a GPU does not repeat the edge.
    border = int(4 * package.manifest.map.smoothing_px + 0.5) if module == "peer_gpu" else 0
    apart = difference(maps_of(loaded, inputs), expected, border=border)
    assert apart.within(bound_of(loaded.runs_as)), apart
    assert runs_as in (None, loaded.runs_as)
    assert loaded.versions
    assert np.ptp(expected["anomaly"]) > 0.1, "flat maps agree with anything"


@pytest.mark.parametrize(("loader", "threads"), [("onnxruntime", 1), ("openvino", 1), ("eager", 2)])
@pytest.mark.usefixtures("one_thread")
def test_torch_is_not_in_the_way_of_another_runtime_s_threads(
    loader: str, threads: int, spec_for: Callable[..., Spec]
) -> None:
    """Two pools of as many threads as cores spin against each other, and the peer looks slower than it is."""
    if loader == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="pip install 'dapo-edge[peers]'")
    torch.set_num_threads(2)
    loaded = getattr(peer_models, loader)(dataclasses.replace(spec_for(""), threads=2))
    assert torch.get_num_threads() == threads
    assert (peer_models.AROUND in loaded.notes) == (threads == 1)


@pytest.mark.usefixtures("one_thread")
def test_what_a_machine_or_package_lacks_is_said(spec_for: Callable[..., Spec]) -> None:
    with pytest.raises(RecipeError, match="no INT8 encoder"):
        peer_models.ours(spec_for("", "int8"))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="sees no GPU"):
            peer_gpu.eager(spec_for("", "fp16"))
    pytest.importorskip("onnxruntime", reason="pip install 'dapo-edge[peers]'")
    with pytest.raises(DependencyMissing, match="no OtherExecutionProvider"):
        peer_models.onnxruntime_session(spec_for(""), Path("encoder.onnx"), "OtherExecutionProvider")


# --- a contender's process


def test_a_worker_answers_until_its_input_ends(
    monkeypatch: pytest.MonkeyPatch, spec_for: Callable[..., Spec], tmp_path: Path
) -> None:
    seen: list[tuple[int, ...]] = []

    def inspect(frame: Any) -> tuple[Any, Any]:
        seen.append(frame.shape)
        return frame[..., 0].astype(np.float32), None

    loader = loader_module(monkeypatch, lambda spec: Loaded(inspect, "fp32", {"it": "1.0"}, ("noted",), inspect))
    requests = [{"do": "check", "out": str(tmp_path / "maps.npz")}, {"do": "run", "warm": 2, "frames": 3}]
    replies = io.StringIO()
    lines = io.StringIO("".join(json.dumps(one) + "\n" for one in requests))
    assert peer_worker.serve(spec_for(loader), lines, replies) == 0
    ready, checked, ran = map(json.loads, replies.getvalue().splitlines())
    assert ready == {"runs_as": "fp32", "versions": {"it": "1.0"}, "notes": ["noted"]}
    assert checked["ms"] > 0
    assert [len(ran[source]) for source in ("raw", "jpeg")] == [3, 3]
    assert seen == [(120, 160, 3)] * (4 + 1 + 1 + 2 + 6), "four maps and a reference, one timed; two warm, three pairs"
    with np.load(tmp_path / "maps.npz") as maps:
        assert {name: maps[name].shape for name in maps} == {"anomaly": (4, 120, 160), "reference": (1, 120, 160)}


@pytest.mark.parametrize(
    ("request_line", "reason"),
    [('{"do": "dance"}', "nobody knows what this means"), ("no JSON", "JSONDecodeError"), ('{"do": "run"}', "warm")],
)
def test_a_worker_says_what_it_can_t_do(
    request_line: str, reason: str, monkeypatch: pytest.MonkeyPatch, spec_for: Callable[..., Spec]
) -> None:
    loader = loader_module(monkeypatch, lambda spec: Loaded(lambda frame: (frame, None), "fp32"))
    replies = io.StringIO()
    assert peer_worker.serve(spec_for(loader), io.StringIO(f"{request_line}\n"), replies) == 1
    assert reason in json.loads(replies.getvalue().splitlines()[-1])["error"]


def test_a_process_that_fails_dies_or_hangs_has_a_reason(
    spec_for: Callable[..., Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(
        "import os, sys, time\n"
        "def fails(spec): raise MemoryError('no room')\n"
        "def dies(spec): print('shot', file=sys.stderr, flush=True); os._exit(9)\n"
        "def hangs(spec): time.sleep(60)\n"
        "def breaks_off(spec): os.write(3, b'{\"runs_as\": '); os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peer_process, "END_S", 0.2)
    for function, seconds, reason in (
        ("fails", 60, "MemoryError: no room"),
        ("dies", 60, r"ended \(status 9\): shot"),
        ("hangs", 1, "no answer within 1 s"),
        ("breaks_off", 60, r"ended \(status 7\): it said nothing"),
    ):
        with pytest.raises(BackendError, match=reason):
            peer_process.Process(sys.executable, spec_for(f"broken:{function}"), tmp_path / "log", load_s=seconds)


def test_real_processes(package: EnginePackage, inputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    stage = peers.Stage(package, inputs, peers.Options(rounds=2, budget_s=1e-6, anomalib_python=None))
    stage.measure(["eager-fp32", "ours-fp32", "ours-int8"])
    assert {name: row["status"] for name, row in stage.rows.items()} == {
        "eager-fp32": "timed",
        "ours-fp32": "timed",
        "ours-int8": "missing",
    }
    assert stage.rows["ours-int8"]["reason"].startswith("RecipeError: 'tiny.dapo' holds no INT8 encoder")
    rows = peer_results.with_times(stage.rows, stage.rounds)
    assert rows["ours-fp32"]["ms"]["jpeg"]["n"] == 2 * peers.LEAST_FRAMES
    assert rows["ours-fp32"]["ours_times_faster"]["raw"] is None, "without our INT8 there is no ratio"


# --- what is asked for


def test_who_takes_part() -> None:
    with_anomalib, without = CONFIGURATIONS["b16-224"], CONFIGURATIONS["l14-518"]
    assert contenders_for(with_anomalib) == list(CONTENDERS)
    assert set(CONTENDERS) - set(contenders_for(without)) == {"anomalib-winclip"}
    assert contenders_for(without, ("openvino",)) == ["eager-fp32", "openvino", "ours-int8"]
    assert contenders_for(without, ("cuda-ort",)) == ["eager-fp32", "cuda-ort", "ours-tensorrt"]


def test_every_loader_is_there() -> None:
    for name, contender in CONTENDERS.items():
        module, _, function = contender.loader.partition(":")
        assert f"\ndef {function}(spec: Spec) -> Loaded:" in (BENCHMARKS / f"{module}.py").read_text(), name


def test_another_model_s_package_is_refused(package: EnginePackage, tiny_recipe: Recipe) -> None:
    folder = package.path.parent
    other = tiny_recipe.model_copy(update={"image_size": 64})
    recipes = [other, tiny_recipe]  # the second one has no INT8
    configuration = Configuration("a model", package.path.stem, lambda: recipes.pop(0), {})
    for _ in range(2):
        with pytest.raises(RecipeError, match="96 px, INT8: False, and can't stand for a model with INT8"):
            package_of(configuration, (folder / "nowhere", folder))


def test_a_build_that_fails_is_an_error(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_contenders.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=4))
    with pytest.raises(BackendError, match="ended with 4"):
        package_of(Configuration("a model", "new", lambda: tiny_recipe, {}), (tmp_path / "cache",))
    assert Recipe.model_validate_json((tmp_path / "cache" / "new.yaml").read_text(), strict=False).name == "tiny"


def test_recipes_are_valid() -> None:
    sizes = {name: one.recipe().image_size for name, one in CONFIGURATIONS.items()}
    assert sizes == {"b16-224": None, "l14-336": 336, "l14-518": 518, "reference": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "b16-223"], "there is no 'b16-223'. Did you mean 'b16-224'? Take from b16-224, l14-336"),
        (["--configs", ""], "there is no ''"),
        (["--only", "ours-int8,torch"], "there is no 'torch'"),
        (["--rounds", "0"], "at least one round"),
        (["--budget-s", "0"], "a budget above 0 s"),
        (["--budget-s", "nan"], "a budget above 0 s"),
        (["--anomalib-python", "/nowhere/python"], "there is no Python '/nowhere/python'"),
        (["--anomalib-python", "/usr"], "there is no Python '/usr'"),
        (["--packages", "/nowhere"], "there is no folder '/nowhere'"),
        (["--out", "/dev/full"], "'/dev/full' can't be written (it is no plain file)"),
    ],
    ids=str,
)
def test_options_that_can_t_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())

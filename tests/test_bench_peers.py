"""benchmarks/peers.py: every contender computes the same, who does not is not timed, and what the rounds say."""

from __future__ import annotations

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
from peer_results import Difference, bound_of, claims, difference, fastest, merged, table, times, times_faster
from peer_spec import Loaded, Spec
from usual import Usual

BENCHMARKS = Path(peers.__file__).parent
DEVICE = {"line": "One CPU, 2 cores"}


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
    apart = difference(maps_of(loaded, inputs), expected, border)
    assert apart.within(bound_of(loaded.runs_as)), apart
    assert runs_as in (None, loaded.runs_as)
    assert loaded.versions
    assert np.ptp(expected["anomaly"]) > 0.1, "flat maps agree with anything"


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
    loader, replies = (
        loader_module(monkeypatch, lambda spec: Loaded(lambda frame: (frame, None), "fp32")),
        io.StringIO(),
    )
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
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peer_process, "END_S", 0.2)
    for function, seconds, reason in (
        ("fails", 60, "MemoryError: no room"),
        ("dies", 60, r"ended \(status 9\): shot"),
        ("hangs", 1, "no answer within 1 s"),
    ):
        with pytest.raises(BackendError, match=reason):
            peer_process.Process(sys.executable, spec_for(f"broken:{function}"), tmp_path / "log", load_s=seconds)


# --- the rounds


class FakeProcess:
    """In the place of a contender's process: computes what it is told to, and takes as long."""

    asked: list[str]
    made: list[str]
    maps: dict[str, float]  # by loader and precision, what its maps are off by; beyond 1: it can't be loaded
    breaks: str | None

    def __init__(self, python: str, spec: Spec, log: Path) -> None:
        self.name = log.stem
        FakeProcess.made.append(self.name)
        if self.maps.get(self.name, 0) > 1:
            raise BackendError("it is not installed", "Install it")
        kind = CONTENDERS[self.name].precision.partition("-")[0]
        runs_as = kind if kind in ("fp32", "bf16", "fp16", "int8") else "bf16"
        self.about = {"runs_as": runs_as, "versions": {}, "notes": []}
        self.cpu_s = 0.0

    def ask(self, *, do: str, out: str = "", warm: int = 0, frames: int = 0) -> dict[str, Any]:
        if do == "check":
            anomaly = np.full((4, 8, 8), 0.5 + self.maps.get(self.name, 0))
            np.savez(out, anomaly=anomaly, types=np.zeros((4, 8, 8), np.uint8), reference=anomaly[:1])
            return {"ms": 10.0}
        FakeProcess.asked.append(self.name)
        if self.breaks == self.name:
            raise BackendError("its process ended", "Look")
        return {"raw": [10.0] * frames, "jpeg": [20.0] * frames}

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def stage(package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> peers.Stage:
    monkeypatch.setattr(peers, "Process", FakeProcess)
    monkeypatch.setattr(peers, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(peers, "available_mb", lambda: 1e6)
    FakeProcess.asked, FakeProcess.made, FakeProcess.maps, FakeProcess.breaks = [], [], {}, None
    return peers.Stage(package, tmp_path, peers.Options(rounds=3, budget_s=0.08, anomalib_python=None))


def test_everyone_begins_a_round_once(stage: peers.Stage) -> None:
    stage.measure(["eager-fp32", "ort-fp32", "ours-int8"])
    eager, ort, ours = "eager-fp32", "ort-fp32", "ours-int8"
    assert FakeProcess.asked == [eager, ours, ort, ours, ort, eager, ort, eager, ours]
    assert [len(one) for one in stage.rounds] == [3, 3, 3]
    assert len(stage.rounds[0][ort]["raw"]) == 4, "80 ms for frames of 10 ms, each raw and as a JPEG"
    assert stage.waiting_cpu_share == 0


def test_who_is_wrong_is_not_timed(stage: peers.Stage) -> None:
    FakeProcess.maps = {"ort-fp32": 0.05, "eager-bf16": 0.004, "openvino": float("nan"), "compile-fp32": 2}
    stage.measure(["eager-fp32", "eager-bf16", "compile-fp32", "ort-fp32", "openvino", "anomalib-winclip", "ours-int8"])
    found = {name: row["status"] for name, row in stage.rows.items()}
    assert found == {
        "eager-fp32": "timed",
        "ours-int8": "timed",
        "eager-bf16": "timed",
        "compile-fp32": "missing",
        "ort-fp32": "wrong",
        "openvino": "wrong",
        "anomalib-winclip": "missing",
    }
    assert set(FakeProcess.asked) == {"eager-fp32", "ours-int8", "eager-bf16"}
    assert stage.rows["compile-fp32"]["reason"] == "it is not installed"
    assert stage.rows["anomalib-winclip"]["reason"] == "anomalib is not installed here"
    assert stage.rows["ort-fp32"]["difference"]["max_difference"] == pytest.approx(0.05)


def test_short_memory_makes_groups_that_can_be_compared(stage: peers.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available_mb", lambda: 0.0)
    stage.measure(["eager-fp32", "ort-fp32", "openvino", "ours-int8"])
    assert [set(one) for one in stage.rounds] == [{"eager-fp32", "ours-int8", "ort-fp32"}] * 3 + [
        {"eager-fp32", "ours-int8", "openvino"}
    ] * 3
    assert times_faster(stage.rounds, "ours-int8", "openvino", "raw") == {"median": 1, "min": 1, "max": 1}


def test_who_breaks_in_a_round_is_out(stage: peers.Stage) -> None:
    FakeProcess.breaks = "ort-fp32"
    stage.measure(["eager-fp32", "ort-fp32", "ours-int8"])
    assert stage.rows["ort-fp32"] == {"status": "missing", "reason": "failed while it was timed: its process ended"}
    assert FakeProcess.asked.count("ort-fp32") == 1
    assert FakeProcess.asked.count("ours-int8") == 3


def test_real_processes(package: EnginePackage, inputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    stage = peers.Stage(package, inputs, peers.Options(rounds=2, budget_s=0.01, anomalib_python=None))
    stage.measure(["eager-fp32", "ours-fp32", "ours-int8"])
    assert {name: row["status"] for name, row in stage.rows.items()} == {
        "eager-fp32": "timed",
        "ours-fp32": "timed",
        "ours-int8": "missing",
    }
    assert "no INT8 encoder" in stage.rows["ours-int8"]["reason"]
    rows = peer_results.with_times(stage.rows, stage.rounds)
    assert rows["ours-fp32"]["ms"]["jpeg"]["n"] == 2 * peers.LEAST_FRAMES
    assert rows["ours-fp32"]["ours_times_faster"]["raw"] is None, "without our INT8 there is no ratio"


# --- what they say


def test_differences() -> None:
    expected = {"anomaly": np.zeros((2, 4, 4)), "types": np.zeros((2, 4, 4), np.uint8)}
    found = {"anomaly": np.zeros((2, 4, 4)), "types": np.zeros((2, 4, 4), np.uint8)}
    found["anomaly"][0, 0, 0], found["types"][0, 0, 0] = 0.32, 3
    assert difference(found, expected) == Difference(0.32, 0.01, 31 / 32)
    assert difference(found, expected, border=1) == Difference(0, 0, 1)
    assert difference({"anomaly": found["anomaly"]}, expected).type_agreement is None
    with pytest.raises(ValueError, match="can't be compared"):
        difference({"anomaly": np.zeros((1, 4, 4))}, expected)


def test_bounds_are_of_a_precision() -> None:
    assert bound_of("int8+bf16") == bound_of("int8") != bound_of("fp32")
    assert bound_of("bf16") == bound_of("fp16")
    with pytest.raises(KeyError):
        bound_of("fp4")
    bound = bound_of("fp32")
    assert Difference(bound.max_difference, bound.mean_difference, bound.type_agreement).within(bound)
    assert Difference(0, 0, None).within(bound)
    assert not Difference(float("nan"), 0, 1).within(bound)
    assert not Difference(0, 0.1, 1).within(bound)
    assert not Difference(0, 0, 0.5).within(bound)


ROUNDS: list[dict[str, dict[str, list[float]]]] = [
    {"eager-fp32": {"raw": [40, 42, 99]}, "ours-int8": {"raw": [10, 10, 11]}},
    {"eager-fp32": {"raw": [80, 84, 90]}, "ours-int8": {"raw": [20, 20, 20]}, "ort-fp32": {"raw": [30, 30, 30]}},
    {"eager-fp32": {"raw": [60, 60, 60]}, "ours-int8": {"raw": [10, 10, 10]}},
]


def test_ratios_are_of_one_round() -> None:
    faster = times_faster(ROUNDS, "ours-int8", "eager-fp32", "raw")
    assert faster == {"median": 4.2, "min": 4.2, "max": 6}
    assert times_faster(ROUNDS, "ours-int8", "ort-fp32", "raw") == {"median": 1.5, "min": 1.5, "max": 1.5}
    assert times_faster(ROUNDS, "ours-int8", "openvino", "raw") is None
    taken = times(ROUNDS, "eager-fp32", "raw")
    assert taken is not None
    assert (taken["n"], taken["rounds"], taken["median"]) == (9, 3, 60)
    assert (taken["lowest_round"], taken["highest_round"]) == (42, 84)
    assert taken["p95"] == pytest.approx(np.percentile([40, 42, 99, 80, 84, 90, 60, 60, 60], 95))
    assert times(ROUNDS, "openvino", "raw") is None


def rows_with(**medians: float | None) -> dict[str, dict[str, Any]]:
    """Rows by name (with _ for -) whose frames take so many ms where ours take 10; None: wrong."""
    rows = {}
    for name, ms in medians.items():
        ratio = {"median": (ms or 0) / 10, "min": 1.0, "max": 9.0}
        taken = {"median": ms, "p95": ms, "lowest_round": ms, "highest_round": ms, "n": 3, "rounds": 1}
        apart = {"max_difference": 0.5, "mean_difference": 0.1, "type_agreement": 0.7}
        timed = {"ms": {"raw": taken, "jpeg": taken}, "ours_times_faster": {"raw": ratio, "jpeg": ratio}}
        row = {"status": "wrong"} if ms is None else {"status": "timed", **timed}
        rows[name.replace("_", "-")] = {**row, "runs_as": "fp32", "difference": apart}
    return rows


ALL = {
    "eager_fp32": 45.0,
    "eager_bf16": None,
    "ort_int8_qdq": 30.0,
    "ort_int8_dynamic": 13.0,
    "openvino": 14.0,
    "anomalib_winclip": 5.0,
    "ours_fp32": 12.0,
    "ours_int8": 10.0,
    "cuda_eager": 1.0,
}
ASKED = {"eager-fp32": 4.0, "ort-int8": 1.4, "best": 1.2}


def test_claims_are_against_the_best_that_computes_the_same() -> None:
    found = {claim["over"]: claim for claim in claims(rows_with(**ALL), ASKED)}
    assert [found[over]["contender"] for over in ASKED] == ["eager-fp32", "ort-int8-dynamic", "ort-int8-dynamic"]
    assert [found[over]["holds"] for over in ASKED] == [True, False, True]
    assert found["ort-int8"]["times_faster"]["median"] == 1.3
    unasked = claims(rows_with(**ALL), {})
    assert [claim["holds"] for claim in unasked] == [None] * 3
    assert fastest(rows_with(eager_fp32=None), ["eager-fp32"]) is None
    assert [claim["holds"] for claim in claims({}, ASKED)] == [None] * 3


def configuration_of(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"date": "2026-11-21T00:00:00", "defect_types": 18, "contenders": rows, "claims": claims(rows, ASKED)}


def test_the_table_shows_everyone() -> None:
    rows = rows_with(**ALL)
    rows["cuda-graph"] = {"status": "not measured yet: no GPU"}
    rows["ort-fp32"] = {"status": "missing", "reason": "no module | named onnxruntime"}
    lines = table({"configurations": {"b16-224": configuration_of(rows)}}).splitlines()
    assert lines[0] == "**ViT-B/16 at 224 px**, 18 defect types, 2026-11-21"
    body = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in body} == {10}, "every row has all cells"
    assert len(body) == 2 + len(rows)
    assert "| torch eager FP32 | fp32 | 45.0 | 45.0 | 45.0 to 45.0 | 45.0 | 4.50x (1.00 to 9.00) |" in lines[4]
    assert any("torch eager BF16 | fp32 | wrong | -" in line and "0.5000, 0.10000 | 70.0 %" in line for line in body)
    assert any("CUDA graph | - | not measured yet: no GPU |" in line for line in body)
    assert any("missing: no module / named onnxruntime" in line for line in body)
    assert "- dapo-edge INT8 over torch eager FP32: 4.50x (asked: 4x). Holds." in lines
    assert any("ONNX Runtime, ONNX" in line and "**Does not hold.**" in line for line in lines)


def test_the_file_keeps_other_configurations_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(merged(path, DEVICE, {"reference": {"one": 1}})))
    found = merged(path, DEVICE, {"b16-224": {"two": 2}})
    assert list(found["configurations"]) == ["b16-224", "reference"]
    assert merged(path, DEVICE, {"reference": {}})["configurations"] == {"reference": {}}
    for text in (path.read_text().replace("One CPU", "Another"), "[]", '{"schem', '{"schema": "dapo-edge peers 1"}'):
        path.write_text(text)
        with pytest.raises(RecipeError, match="another machine or format"):
            merged(path, DEVICE, {})


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
    for recipe in (other, tiny_recipe):  # the second one has no INT8
        configuration = Configuration("a model", package.path.stem, lambda recipe=recipe: recipe, {})
        with pytest.raises(RecipeError, match="96 px, INT8: False, and can't stand for a model with INT8"):
            package_of(configuration, (folder / "nowhere", folder))


def test_a_build_that_fails_is_an_error(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_contenders.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=4))
    with pytest.raises(BackendError, match="ended with 4"):
        package_of(Configuration("a model", "new", lambda: tiny_recipe, {}), (tmp_path / "cache",))
    assert Recipe.model_validate_json((tmp_path / "cache" / "new.yaml").read_text(), strict=False).name == "tiny"


def test_recipes_are_valid_and_have_int8() -> None:
    sizes = {name: one.recipe().image_size for name, one in CONFIGURATIONS.items()}
    assert sizes == {"b16-224": None, "l14-336": 336, "l14-518": 518, "reference": None}
    assert {one.recipe().precision for one in CONFIGURATIONS.values()} == {"auto"}


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


def test_another_machine_s_file_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peers.json"
    path.write_text("{}")
    monkeypatch.setattr(peers, "measured", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(RecipeError, match="another machine or format"):
        peers.main(["--out", str(path)])
    assert path.read_text() == "{}"


def test_each_configuration_is_written_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(name: str, folders: tuple[Path, ...], options: peers.Options, command: str) -> dict[str, Any]:
        if name == "reference":
            raise KeyboardInterrupt
        assert command.endswith(f"--out {path}")
        return configuration_of(rows_with(**ALL))

    path = tmp_path / "new" / "peers.json"
    monkeypatch.setattr(peers, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        peers.main(["--configs", "b16-224,reference", "--out", str(path)])
    assert list(json.loads(path.read_text())["configurations"]) == ["b16-224"]
    peers.main(["--configs", "b16-224", "--out", str(path)])
    assert capsys.readouterr().out.startswith("**ViT-B/16 at 224 px**")

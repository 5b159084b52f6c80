"""The run config: every mistake at once, with its path; and file, environment and options in their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapo_edge.errors import RecipeError
from dapo_edge.package import Threshold, Thresholds
from dapo_edge.runtime.run_config import Limits, Overrides, RunConfig, load_run_config, run_schema
from dapo_edge.runtime.run_layers import escaped, substituted

SMALL = {"package": "p.dapo", "sources": [{"uri": "synthetic://64x64"}, {"uri": "parts"}]}


def load(
    folder: Path, content: dict[str, Any], environment: dict[str, str] | None = None, **overrides: Any
) -> RunConfig:
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_run_config(path, Overrides(**overrides), environment)


def mistakes(folder: Path, content: dict[str, Any], *args: Any, **overrides: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, content, *args, **overrides)
    assert caught.value.exit_code == 2
    assert "dapo-edge run --schema" in caught.value.remedy
    return caught.value.cause


def test_a_small_config_has_names_paths_and_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL)
    assert config.package == tmp_path / "p.dapo"
    assert [(source.name, source.uri) for source in config.sources] == [
        ("camera1", "synthetic://64x64"),
        ("camera2", str(tmp_path / "parts")),
    ]
    assert [(sink.kind, sink.name) for sink in config.sinks] == [("lines", "lines")]
    plan = config.cameras[0]
    assert (plan.name, plan.policy, plan.max_age_s, plan.queue, plan.views) == ("camera1", None, None, 4, None)
    assert (plan.silence_s, plan.triggered) == (None, None)


def test_a_full_config_becomes_plans(tmp_path: Path) -> None:
    source = {
        "name": "left", "uri": "synthetic://640x480", "policy": "newest", "max_age_ms": 250, "fps": 12.5, "frames": 9,
        "queue": 2, "tiles": {"size": [128, 96], "overlap": 16}, "silence_s": 30, "triggered": True,
        "regions": [{"box": [0, 0, 320, 200]}, {"name": "rim", "polygon": [[330, 10], [600, 10], [600, 300]]}],
    }  # fmt: skip
    sinks = [
        {"kind": "jsonl", "path": "out/r.jsonl", "max_mb": 5, "keep": 2},
        {"kind": "jsonl", "queue": 9, "policy": "wait"},
        {"kind": "pictures", "path": "~/overlays", "only": ["ng"]},
    ]
    config = load(tmp_path, {**SMALL, "map_size": [320, 240], "sources": [source], "sinks": sinks})
    (plan,) = config.cameras
    assert (plan.policy, plan.max_age_s, plan.fps, plan.frames, plan.queue) == ("newest", 0.25, 12.5, 9, 2)
    assert (plan.silence_s, plan.triggered) == (30.0, True)
    assert plan.views is not None
    assert (plan.views.tile, plan.views.overlap) == ((128, 96), 16)
    assert [region.name for region in plan.views.regions] == ["", "rim"]
    assert plan.views.regions[1].corners == ((330, 10), (600, 10), (600, 300))
    assert [sink.name for sink in config.sinks] == ["jsonl", "jsonl2", "pictures"]
    file, stdout, pictures = config.sinks
    assert (file.path, stdout.path) == (tmp_path / "out/r.jsonl", None)
    assert pictures.path == Path("~/overlays").expanduser()
    assert config.map_size == (320, 240)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"fps": 0}, "'sources.0.fps' is 0: input should be greater than 0"),
        ({"max_age_ms": -1}, "'sources.0.max_age_ms' is -1"),
        ({"frames": 0}, "'sources.0.frames' is 0"),
        ({"queue": 0}, "'sources.0.queue' is 0"),
        ({"silence_s": 0}, "'sources.0.silence_s' is 0: input should be greater than 0"),
        ({"triggered": "often"}, "'sources.0.triggered' is 'often': input should be a valid boolean"),
        ({"policy": "latest"}, "'sources.0.policy' is 'latest': input should be 'wait' or 'newest'"),
        ({"name": "../x"}, "'sources.0.name' is '../x'"),
        ({"uri": ""}, "'sources.0.uri' is ''"),
        ({"uri": "rtps://cam/1"}, "'sources.0.uri' is 'rtps://cam/1': unknown kind. Did you mean 'rtsp"),
        ({"url": "x"}, "unknown key 'sources.0.url' (did you mean 'uri'?)"),
        ({"regions": [{"box": [0, 0, 0, 5]}]}, "'sources.0.regions.0.box' is [0, 0, 0, 5]"),
        ({"regions": [{"box": [0, 0, 9]}]}, "sources.0.regions.0.box"),
        ({"regions": [{"box": [-1, 0, 99, 99]}]}, "begins outside of the frame"),
        ({"regions": [{"polygon": [[0, 0], [99, 99]]}]}, "has 2 corners"),
        ({"regions": [{"polygon": [[0, 0], [99, 99], [99, 0], [0, 99]]}]}, "'sources.0.regions.0.polygon' is"),
        ({"regions": [{"polygon": [[0, 0], [99, 99], [99, 0], [0, 99]]}]}, "crosses or touches itself"),
        ({"regions": [{}]}, "give either 'box' or 'polygon'"),
        ({"regions": [{"box": [0, 0, 50, 50], "polygon": [[0, 0], [50, 0], [0, 50]]}]}, "give either"),
        ({"tiles": {"size": 64, "overlap": 64}}, "not larger than their overlap"),
        ({"tiles": {"size": 0}}, "'sources.0.tiles' is {'size': 0}"),
        ({"tiles": {}}, "the key 'sources.0.tiles.size' is missing"),
    ],
)
def test_mistakes_of_a_source(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    assert message in mistakes(tmp_path, {**SMALL, "sources": [{"uri": "synthetic://", **source}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "'sources' is []"),
        ({"sources": 3}, "'sources' is 3"),
        ({"sources": ["cam", None]}, "sources.0"),
        ({"package": None}, "the key 'package' is missing"),
        ({"backend": "openvin"}, "Did you mean 'openvino'?"),
        ({"precision": "fp8"}, "'precision' is 'fp8'"),
        ({"map_size": [0, 3]}, "is not a map size"),
        ({"map_size": "big"}, "'map_size' is 'big'"),
        ({"thresholds": {"image": 1.5}}, "'thresholds.image' is 1.5"),
        ({"thresholds": {"pixels": 0.5}}, "unknown key 'thresholds.pixels' (did you mean 'pixel'?)"),
        ({"drain_s": 0}, "'drain_s' is 0"),
        ({"batch_window_ms": float("nan")}, "'batch_window_ms'"),
        ({"sinks": [{"kind": "jsnol"}]}, "is 'jsnol': Did you mean 'jsonl'? Valid are jsonl, lines, pictures"),
        ({"sinks": [{"path": "x"}]}, "the key 'sinks.0.kind' is missing"),
        ({"sinks": [{"kind": "pictures"}]}, "the key 'sinks.0.path' is missing"),
        ({"sinks": [{"kind": "pictures", "path": "x", "pth": 1}]}, "unknown key 'sinks.0.pth' (did you mean 'path'?)"),
        ({"sinks": [{"kind": "pictures", "path": "x", "only": []}]}, "'sinks.0.only'"),
        ({"sinks": [{"kind": "lines", "max_mb": 1}]}, "unknown key 'sinks.0.max_mb'"),
        ({"sinks": [{"kind": "pictures", "path": "x", "keep": 0}]}, "'sinks.0.keep' is 0"),
        ({"sinks": [{"kind": "pictures", "path": "x.mp4", "segment_s": 0}]}, "'sinks.0.segment_s' is 0"),
        (
            {"sinks": [{"kind": "jsonl", "path": "rtsp://u:geheim@cam/1"}]},
            "'sinks.0.path' is 'rtsp://***@cam/1': an address",
        ),
        ({"sinks": [{"kind": "jsonl"}, {"kind": "jsonl"}]}, "'sinks.1.path' is stdout: so is that of sinks.0"),
        (
            {"sinks": [{"kind": "lines", "name": "a"}, {"kind": "jsonl", "name": "a"}]},
            "'sinks.1.name' is 'a': so is that of sinks.0",
        ),
        ({"sources": [{"uri": "synthetic://", "name": "camera2"}, {"uri": "x"}]}, "'sources.1.name' is 'camera2'"),
        (
            {"sources": [{"uri": "synthetic://", "name": "Left"}, {"uri": "x", "name": "left"}]},
            "'sources.1.name' is 'left': only capitals differ from the name of sources.0",
        ),
        ({"sources": [{"uri": "x", "name": "left "}]}, "'sources.0.name' is 'left ': string should match pattern"),
        ({"sources": [{"uri": "x", "name": " left"}]}, "'sources.0.name' is ' left': string should match pattern"),
        ({"sources": [{"uri": f"x{number}"} for number in range(300)]}, "at most 256 items"),
        ({"sinks": [{"kind": "jsonl", "path": f"x{number}"} for number in range(300)]}, "at most 256 items"),
    ],
)  # fmt: skip
def test_mistakes_elsewhere(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    text = mistakes(tmp_path, {**SMALL, **change})
    assert message in text
    assert "geheim" not in text


def test_every_mistake_is_listed_at_once_and_no_password(tmp_path: Path) -> None:
    content = {
        "package": "${NOWHERE}/p.dapo",
        "backend": "openvin",
        "thresholds": {"pixel": -1},
        "sources": [
            {"uri": "rtps://u:geheim@cam/1", "fps": 0},
            {"uri": "parts", "name": "camera1", "tiles": {"size": 64, "overlap": 70}},
            {"uri": "rtsp://u:geheim@cam/2", "regions": [{"polygon": [[0, 0], [99, 99], [99, 0], [0, 99]]}]},
            {"uri": "rtsp://u:geheim@cam/2", "regions": [{}], "url": 1},
        ],
        "sinks": [{"kind": "pictures", "path": "parts"}, {"kind": "x"}],
    }
    text = mistakes(tmp_path, content, {"DAPO_EDGE_RUN__BAKEND": "x"}, settings=("sources.9.fps=1", "nonsense"))
    for part in (
        "line.yaml, DAPO_EDGE_RUN__BAKEND: ", "'package' needs the environment variable NOWHERE",
        "'--set nonsense' sets nothing", "--set sources.9.fps: 'sources' has 4 items, so there is no '9'",
        "'sources.1.name' is 'camera1'",
        "'sinks.0.path' is", "'backend' is 'openvin'", "'thresholds.pixel' is -1", "'sources.0.uri' is 'rtps://***@cam/1'",
        "'sources.0.fps' is 0", "'sources.1.tiles'", "'sources.2.regions.0.polygon'", "'sources.3.regions.0'",
        "unknown key 'sources.3.url'", "'sinks.1.kind' is 'x'", "unknown key 'bakend'",
    ):  # fmt: skip
        assert part in text, part
    assert "geheim" not in text
    assert text.count("sources.9.fps") == 1, "a change without a place is named once"


URI = "rtsp://admin:geheim@cam/1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"- uri: {URI}\n   bad: [", "is not valid YAML: "),
        ("- uri: rtsp://admin:ge: heim@cam/1", "mapping values are not allowed here (line 3, column"),
        (f"- uri: '{URI}", "found unexpected end of stream (line 4, column 1)"),
        ("- uri: *geheim", "found undefined alias (line 3, column"),
        ("- uri: !geheim x", "could not determine a constructor for the tag (line 3, column"),
        (f'- "{URI}": 1\n   "{URI}": 2', "the key *** is given twice (line 3, column"),
        (f'- "{URI}": 1', "unknown key 'sources.0.***'"),
        ("- rtsp://admin:ge: heim@cam/1", "unknown key 'sources.0.***'"),
        (f"- {URI}", "'sources.0' is 'rtsp://***@cam/1'"),
        (f"- [{URI}, {{uri: {URI}}}]", "'sources.0' is ['rtsp://***@cam/1', {'uri': 'rtsp://***@cam/1'}]"),
        (f'- uri: "${{X-{URI}}}"', "'sources.0.uri' holds '${' without a name"),
        (f'- "{URI}": "${{X"', "'sources.0.***' holds '${' without a name"),
        (f'- name: "{URI}"\n   uri: a\n - name: "{URI}"\n   uri: b', "'sources.1.name' is 'rtsp://***@cam/1': so is"),
        (f"- uri: a\nbackend: {URI}", "'backend' is 'rtsp://***@cam/1'"),
        (f"- uri: a\nmap_size: {URI}", "'map_size' is 'rtsp://***@cam/1'"),
        (f"- uri: a\nsinks: [{{kind: '{URI}'}}]", "'sinks.0.kind' is 'rtsp://***@cam/1'"),
        (f"- uri: a\nsinks: [{{kind: jsonl, path: '{URI}'}}]", "'sinks.0.path' is 'rtsp://***@cam/1': an address"),
        (f"- uri: a\nthresholds: {{image: '{URI}'}}", "'thresholds.image' is 'rtsp://***@cam/1'"),
    ],
)
def test_no_mistake_in_a_config_prints_its_passwords(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "line.yaml").write_text(f"package: p\nsources:\n {text}\n")
    with pytest.raises(RecipeError) as caught:
        load_run_config(tmp_path / "line.yaml")
    shown = str(caught.value)
    assert message in shown
    assert not {part for part in ("geheim", "heim@", ":ge") if part in shown}, shown


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        (("sources.0.uri.x=1",), {}, "'sources.0.uri' is 'rtsp://***@cam/1', which has no 'x'"),
        ((f"sources.0.{URI}=1",), {}, "--set sources.0.***"),
        ((f"sources.0.uri:{URI}",), {}, "'--set sources.0.***' sets nothing"),
        ((f"sources.{URI}=1",), {}, "'sources' is a list; '***' is no place in it"),
        ((f"package={URI}",), {}, "'package' is 'rtsp://***@cam/1': an address, where a path is needed"),
        ((), {"DAPO_EDGE_RUN__SOURCES__0__URI__X": URI}, "'sources.0.uri' is 'rtsp://***@cam/1', which has no 'x'"),
        ((), {"DAPO_EDGE_RUN__SOURCES__0__FPS": URI}, "'sources.0.fps' is 'rtsp://***@cam/1'"),
    ],
)
def test_no_mistake_in_a_change_prints_passwords(
    tmp_path: Path, settings: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    text = mistakes(tmp_path, {"package": "p", "sources": [{"uri": URI}]}, environment, settings=settings)
    assert message in text
    assert "geheim" not in text


def test_results_never_replace_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.png").touch()
    for sink, source in (
        ({"kind": "pictures", "path": "parts"}, "parts"),
        ({"kind": "pictures", "path": "parts/x.png"}, f"dir://{tmp_path}/parts"),
        ({"kind": "pictures", "path": "parts"}, f"image://{tmp_path}/parts/a.png"),
        ({"kind": "jsonl", "path": "belt.mp4"}, f"file://{tmp_path}/belt.mp4"),
    ):
        text = mistakes(tmp_path, {"package": "p", "sources": [{"uri": source}], "sinks": [sink]})
        assert "'sinks.0.path' is" in text
        assert "where the source" in text
    load(
        tmp_path, {"package": "p", "sources": [{"uri": "parts"}], "sinks": [{"kind": "pictures", "path": "parts/out"}]}
    )


def test_flag_over_environment_over_file(tmp_path: Path) -> None:
    content = {**SMALL, "backend": "openvino", "batch_window_ms": 1, "precision": "fp32"}
    environment = {
        "DAPO_EDGE_RUN__BATCH_WINDOW_MS": "2",
        "DAPO_EDGE_RUN__PRECISION": "fp16",
        "DAPO_EDGE_RUN__SOURCES__1__FPS": "1e1",
        "DAPO_EDGE_RUN__SOURCES__2__URI": "more",
        "DAPO_EDGE_RUN__THRESHOLDS__IMAGE": "0.5",
        "DAPO_EDGE_RUN__DRAIN_S": "",
        "DAPO_EDGE_CACHE": "/elsewhere",
    }
    config = load(
        tmp_path, content, environment,
        keys={"precision": "int8"}, every_source={"queue": 3}, settings=("sources.1.fps=5", "sources.1.name='7'"),
    )  # fmt: skip
    assert (config.batch_window_ms, config.precision, config.thresholds.image, config.drain_s) == (
        2.0,
        "int8",
        0.5,
        3.5,
    )
    assert [(source.fps, source.queue) for source in config.sources] == [(None, 3), (5.0, 3), (None, 3)]
    assert (config.sources[1].name, config.sources[2].uri) == ("7", str(tmp_path / "more"))


def test_options_replace_package_and_sources_and_add_sinks(tmp_path: Path) -> None:
    given = {"package": Path("other.dapo"), "sources": ("x.png",), "json_lines": True, "pictures": Path("o")}
    config = load(tmp_path, {**SMALL, "sinks": [{"kind": "lines"}]}, **given)
    assert (config.package, config.sources[0].uri) == (Path("other.dapo"), "x.png"), "as seen from here"
    assert [sink.kind for sink in config.sinks] == ["lines", "jsonl", "pictures"]
    assert [sink.kind for sink in load(tmp_path, SMALL, json_lines=True).sinks] == ["jsonl"]
    has_it = load(tmp_path, {**SMALL, "sinks": [{"kind": "jsonl"}]}, json_lines=True)
    assert [sink.kind for sink in has_it.sinks] == ["jsonl"]
    assert load(tmp_path, {**SMALL, "sinks": []}).sinks == ()
    without_file = load_run_config(None, Overrides(Path("p.dapo"), ("synthetic://",)))
    assert (without_file.package, len(without_file.sources)) == (Path("p.dapo"), 1)


def test_variables_in_texts(tmp_path: Path) -> None:
    content = {
        "package": "${HOME_OF_LINE:-engines}/p.dapo",
        "sources": [
            {"uri": "rtsp://u:${CAMERA_PASSWORD}@cam/1", "fps": "${FPS}", "name": "${NAME:-left}"},
            {"uri": "gst://a name=$${b}"},
        ],
    }
    environment = {"CAMERA_PASSWORD": "1:2@3", "FPS": "12", "NAME": ""}
    config = load(tmp_path, {**content, "sources": content["sources"][:1]}, environment)
    assert config.package == tmp_path / "engines/p.dapo"
    assert (config.sources[0].uri, config.sources[0].fps) == ("rtsp://u:1:2@3@cam/1", 12.0)
    assert config.sources[0].name == "left"
    data, wrong = substituted(content, environment)
    assert data["sources"][1]["uri"] == "gst://a name=${b}"
    assert wrong == []
    for text in ("${1x}", "${", "${A", "a${b c}"):
        assert "holds '${" in substituted({"a": [text]}, {"A": "1"})[1][0]
    assert substituted(escaped({"a": "${X} $X $${Y}"}), {})[0] == {"a": "${X} $X $${Y}"}


def test_a_config_that_is_a_bomb_or_contains_itself(tmp_path: Path) -> None:
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    for text, message in (
        (f"{bomb}sources: *a39\n", "more than 50000 values"),
        ("sources: &s [*s]\n", "it contains itself"),
        ("&a\npackage: p\nthresholds: *a\n", "it contains itself"),
    ):
        (tmp_path / "line.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_run_config(tmp_path / "line.yaml")


def test_the_printed_config_means_the_same(tmp_path: Path) -> None:
    content = {
        **SMALL,
        "map_size": [64, 48],
        "thresholds": {"image": 0.5},
        "sources": [{"uri": "parts", "name": "left", "regions": [{"box": [0, 0, 50, 50]}]}],
        "sinks": [{"kind": "pictures", "path": "out $${x}", "only": ["ng"]}, {"kind": "jsonl"}],
    }
    config = load(tmp_path, content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "again.yaml").write_text(config.as_yaml())
    assert load_run_config(tmp_path / "elsewhere" / "again.yaml") == config


def test_the_printed_config_shows_no_password(tmp_path: Path) -> None:
    content = {**SMALL, "sources": [{"uri": "rtsp://user:${PW}@cam/1?token=abc"}]}
    text = load(tmp_path, content, {"PW": "geheim"}).as_yaml()
    assert "rtsp://***@cam/1?token=***" in text
    assert "geheim" not in text


def keys_without_description(schema: Any, where: str = "") -> list[str]:
    if isinstance(schema, list):
        return [found for item in schema for found in keys_without_description(item, where)]
    if not isinstance(schema, dict):
        return []
    missing = [f"{where}.{key}" for key, of in schema.get("properties", {}).items() if "description" not in of]
    return missing + [
        found for key, value in schema.items() for found in keys_without_description(value, f"{where}.{key}")
    ]


def test_the_schema_describes_every_key() -> None:
    schema = json.loads(run_schema())
    assert schema["title"] == "RunConfig"
    assert {"package", "sources", "sinks", "thresholds"} <= schema["properties"].keys()
    assert keys_without_description(schema) == []


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    for content, message in (
        (b"", "the run config .* holds no keys"),
        (b"a: [", "not valid YAML"),
        (b"a: \x07", "character 4 is not allowed in YAML"),
        (b"\xff\xfe", "text"),
    ):
        (tmp_path / "line.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            load_run_config(tmp_path / "line.yaml")
    with pytest.raises(RecipeError, match=r"the run config .* can't be read"):
        load_run_config(tmp_path / "none.yaml")


def test_limits_replace_those_of_the_package() -> None:
    own = Thresholds(pixel=Threshold(value=0.3, false_reject_rate=0.01, confidence_95=(0.0, 0.02)), frames=9, bank="b")
    assert Limits().over(own) is own
    mixed = Limits(image=0.7).over(own)
    assert mixed.image is not None
    assert (mixed.image.value, mixed.pixel, mixed.bank, mixed.source) == (0.7, own.pixel, "b", "run config")

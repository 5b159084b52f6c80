"""What a run config is put together from: settings and variables find their places, or say why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_edge.errors import RecipeError
from dapo_edge.runtime.run_config import load_run_config
from dapo_edge.runtime.run_layers import changed, from_environment, from_settings


def test_changes_that_have_no_place() -> None:
    data = {"a": {"b": 1}, "items": [{"x": 1}]}
    for keys, message in (
        (("a", "b", "c"), "'a.b' is 1, which has no 'c'"),
        (("items", "x"), "'items' is a list"),
        (("items", "3", "x"), "'items' has 1 items"),
    ):
        assert message in changed(data, {"--set": (keys, 0)})[1]["--set"]
    done, wrong = changed(data, {"one": (("items", "1", "y", "0"), 5), "two": (("new", "key"), None)})
    assert wrong == {}
    assert done == {"a": {"b": 1}, "items": [{"x": 1}, {"y": [5]}], "new": {"key": None}}
    assert data["items"] == [{"x": 1}], "what was given stays as it is"


def test_settings_are_read_as_yaml() -> None:
    found, wrong = from_settings(["a=1", "b.c=[1, 2]", "d=*x", "e=", "f=a=b"])
    assert [value for _, value in found.values()] == [1, [1, 2], "*x", None, "a=b"]
    assert found["--set b.c"][0] == ("b", "c")
    assert wrong == []
    assert len(from_settings(["a", "=1", ".x=1"])[1]) == 3


def test_variables_come_in_the_order_of_their_places() -> None:
    names = [f"DAPO_EDGE_RUN__SOURCES__{number}__URI" for number in (10, 2, 0)]
    assert [keys[1] for keys, _ in from_environment(dict.fromkeys(names, "x")).values()] == ["0", "2", "10"]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("synthetic://640x480@0", "frame rate out of range"),
        ("rtsp://line:geheim@h:99999/", "port"),
        ("csi://x", "csi://"),
        ("dir:///x?watch=7", "watch"),
        ("v4l2:///dev/video7?fps=0", "fps"),
    ],
)
def test_an_address_that_can_not_work_is_a_mistake_of_the_config(tmp_path: Path, uri: str, said: str) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(f"package: x.dapo\nsources:\n - uri: {uri}\n - uri: synthetic://\n   fps: -1\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_run_config(path)
    text = str(caught.value)
    assert "'sources.0.uri'" in text and said in text and "'sources.1.fps'" in text and "geheim" not in text

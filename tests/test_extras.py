"""Optional packages: what to install is said where one is missing."""

from __future__ import annotations

import sys

import pytest

from dapo_edge.errors import DependencyMissing
from dapo_edge.extras import require


@pytest.mark.parametrize(("extra", "named"), [(None, "build"), ("gpu", "gpu")])
def test_the_extra_that_brings_a_missing_package(
    extra: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DependencyMissing, match=rf"'onnx' can't be imported.*pip install 'dapo-edge\[{named}\]'"):
        require("onnx", extra=extra)


def test_what_is_there_is_imported() -> None:
    assert require("json", extra="gpu") is sys.modules["json"]

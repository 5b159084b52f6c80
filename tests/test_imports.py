"""Who may import whom, what an import costs, and that the public list is true."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dapo_edge

PACKAGE = Path(dapo_edge.__file__).parent
WORKSHOP = ("models", "training", "evaluation", "calibration", "engine")
LINE = ("runtime", "backends", "kernels", "outputs")
HEAVY = ("torch", "torchvision", "open_clip", "openvino", "tensorrt", "pycuda", "onnx", "cv2", "PIL", "scipy")
HEAVY_IN_PRINT = ("torch", "open_clip", "openvino", "tensorrt", "pycuda")


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("dapo_edge", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules that a file imports when it is loaded, or also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if is_typing or (is_function and not lazy):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from visit(child)

    yield from visit(tree)


def test_the_line_never_imports_the_workshop() -> None:
    for name, path in modules().items():
        if name.split(".")[1:2] and name.split(".")[1] in LINE:
            for imported in imports(path, lazy=True):
                assert imported.split(".")[0] not in ("torch", "open_clip"), f"{name} imports {imported}"
                wing = imported.split(".")[1] if imported.startswith("dapo_edge.") else ""
                assert wing not in WORKSHOP, f"{name} imports {imported}"


def test_the_ground_floor_imports_no_torch() -> None:
    for name, path in modules().items():
        if name.split(".")[1:2] and name.split(".")[1] not in WORKSHOP:
            assert not {"torch", "open_clip"} & {imported.split(".")[0] for imported in imports(path, lazy=True)}, name


def test_imports_make_no_circle() -> None:
    known = modules()
    graph = {name: {used for used in imports(path, lazy=False) if used in known} for name, path in known.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for used in graph[name]:
                walk(used, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("statement", ["import dapo_edge", "import dapo_edge.cli"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    loaded = python(f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded == "[]"


def test_inspecting_needs_no_torch() -> None:
    """The whole line wing, and what it stands on, loads with the build extra's packages out of reach."""
    names = [
        name for name in modules() if not name.split(".")[1:2] or name.split(".")[1] not in (*WORKSHOP, "__main__")
    ]
    python(
        f"import sys, importlib\n"
        f"for name in ('torch', 'torchvision', 'open_clip', 'onnx', 'tensorrt', 'pycuda'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)"
    )


def test_import_takes_less_than_150_ms() -> None:
    code = "import time; t = time.perf_counter(); import dapo_edge; print((time.perf_counter() - t) * 1e3)"
    assert min(float(python(code)) for _ in range(5)) <= 150


def test_missing_extras_say_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['cv2'] = None\n"
        "from dapo_edge.extras import require\n"
        "from dapo_edge.errors import DependencyMissing\n"
        "try: require('cv2')\n"
        "except DependencyMissing as error: print(error)"
    )
    assert "pip install 'dapo-edge[cpu]'" in python(code)


def test_building_without_torch_says_what_to_install(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = None; "
    code = blocked + "import dapo_edge\ntry: dapo_edge.build\nexcept dapo_edge.DapoEdgeError as error: print(error)"
    assert "pip install 'dapo-edge[build]'" in python(code)
    recipe = PACKAGE / "assets" / "surface-tiny.yaml"
    command = (
        f"{blocked}from dapo_edge.cli import main; main(['build', {str(recipe)!r}, '-o', {str(tmp_path / 'x')!r}])"
    )
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 7
    assert result.stderr.startswith("error: the Python package 'torch' can't be imported")
    assert not list(tmp_path.iterdir())


def test_the_public_list_is_sorted_and_true() -> None:
    assert dapo_edge.__all__ == sorted(dapo_edge.__all__)
    assert set(dapo_edge.__all__) == set(dapo_edge._MODULE_OF)
    for name in dapo_edge.__all__:
        assert getattr(dapo_edge, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'inspect'"):
        dapo_edge.inspect  # noqa: B018

"""The real TensorRT bindings without TensorRT: which names exist in which version.

The binding wheels are public and small; they import on stub libraries whose few C functions return nothing. Every
class, enum and signature is then real, though nothing can run. Run as a script inside such an environment, this file
checks the uses that it reads from stdin.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REQUIREMENTS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16.1": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "tensorrt-bindings"
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin", "libnvparsers")
STUBBED = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)
# What a variable of the backend's sources is called, and the class that TensorRT's objects of this name have.
CLASS_OF = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "plan": "IHostMemory",
    "runtime": "Runtime",
    "tensor": "ITensor",
}
RETURNS = re.compile(r"->\s*(?:Optional\[)?tensorrt_bindings\.tensorrt\.([\w.]+)")


class Unavailable(Exception):
    """The bindings can't be had here. The message says why."""


_failed: dict[str, Unavailable] = {}  # without a network, one wait per version is enough


def environment(version: str) -> dict[str, str]:
    """Variables under which `import tensorrt_bindings` loads the real bindings. Downloads them the first time."""
    folder = FOLDER / f"cp{sys.version_info[0]}{sys.version_info[1]}-{version}"
    if version in _failed:
        raise _failed[version]
    try:
        _make(folder, version)
    except Unavailable as error:
        _failed[version] = error
        raise
    return {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / "stubs")}


def _make(folder: Path, version: str) -> None:
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            made = Path(scratch) / "made"
            _download(REQUIREMENTS[version], Path(scratch), made)
            _make_stubs(made / "stubs", version.partition(".")[0])
            if not folder.exists():  # another test run may have been faster
                made.rename(folder)


def _download(requirement: str, scratch: Path, made: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--retries", "1", "--timeout", "20", "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip took too long to download {requirement}") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"pip can't download {requirement}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(made)


def _make_stubs(folder: Path, major: str) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Unavailable("no C compiler for the stub libraries")
    folder.mkdir(parents=True)
    source = folder / "stub.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in STUBBED))
    for library in LIBRARIES:
        name = f"{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", "-o", str(folder / name), f"-Wl,-soname,{name}", str(source)]
        subprocess.run(command, check=True, timeout=60)


@dataclass(frozen=True)
class Use:
    """One expression of the source that reaches into TensorRT."""

    steps: tuple[str, ...]  # ("api", "MemoryPoolType", "WORKSPACE"); "()" stands for a call
    conditions: tuple[tuple[str, bool], ...]  # the tests around it, and their outcome
    line: int
    target: str = ""  # the variable that takes the result


def uses(source: str) -> list[Use]:
    """Every attribute that `source` reaches from `trt.module`, its alias `api`, or a variable named in `CLASS_OF`."""
    collector = _Collector()
    collector.visit(ast.parse(source))
    return sorted(set(collector.found), key=lambda use: (use.line, use.steps))


class _Collector(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Use] = []
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.conditions: tuple[tuple[str, bool], ...] = ()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = self.aliases, self.conditions
        self.aliases = dict(self.aliases)
        for statement in node.body:
            self.visit(statement)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise):
                self.conditions = (*self.conditions, (ast.unparse(statement.test), False))  # what follows is guarded
        self.aliases, self.conditions = outside

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A method of a subclass overrides one of its base: that must exist."""
        for base in node.bases:
            self.visit(base)
            for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
                if steps := self.steps(base):
                    self.add((*steps, method.name), node.lineno)
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        outside = self.conditions
        for outcome, part in ((True, node.body), (False, node.orelse)):
            self.conditions = (*outside, (ast.unparse(node.test), outcome))
            for child in part if isinstance(part, list) else [part]:
                self.visit(child)
        self.conditions = outside

    visit_IfExp = visit_If

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.visit(target)
        target = node.targets[0]
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        for name, value in pairs:
            steps = self.steps(value)
            if isinstance(name, ast.Name) and steps and "()" not in steps and steps[0] == "api":
                self.aliases[name.id] = steps
            if isinstance(name, ast.Name) and steps and steps[-1] == "()":
                self.add(steps, node.lineno, name.id)
        self.visit(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if steps := self.steps(node):
            self.add(steps, node.lineno)
        self.generic_visit(node)

    def add(self, steps: tuple[str, ...], line: int, target: str = "") -> None:
        if len(steps) > 1:
            self.found.append(Use(steps, self.conditions, line, target))

    def steps(self, node: ast.AST) -> tuple[str, ...] | None:
        """("engine", "get_tensor_dtype", "()", "name"), or None for what does not begin at TensorRT."""
        if isinstance(node, ast.Name):
            known = node.id == "api" or node.id in CLASS_OF
            return self.aliases.get(node.id) or ((node.id,) if known else None)
        if isinstance(node, ast.Call):
            inner = self.steps(node.func)
            return (*inner, "()") if inner else None
        if not isinstance(node, ast.Attribute):
            return None
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if owner == "trt" and node.attr == "module":
            return ("api",)
        if owner == "self" and node.attr.lstrip("_") in CLASS_OF:
            return (node.attr.lstrip("_"),)
        inner = self.steps(node.value)
        return (*inner, node.attr) if inner else None


def missing(version: str, wanted: list[Use]) -> list[str]:
    """What of `wanted` the real bindings of `version` lack, one line each. Raises `Unavailable`."""
    return _ask(version, {"uses": [asdict(use) for use in wanted]})


def unreachable(version: str, wanted: list[Use]) -> list[str]:
    """Which of `wanted` stand under a condition that the bindings of `version` do not meet."""
    return _ask(version, {"uses": [asdict(use) for use in wanted], "unreachable": True})


def missing_names(version: str, names: list[str]) -> list[str]:
    """Which of the dotted `names` (`Builder.create_network`) the real bindings of `version` lack."""
    return _ask(version, {"names": names})


def _ask(version: str, question: dict[str, Any]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        input=json.dumps(question),
        env=environment(version),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the bindings of TensorRT {version} don't import: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _answer(api: Any, question: dict[str, Any]) -> Iterator[str]:
    for name in question.get("names", ()):
        if _reach(api, name.split(".")) is None:
            yield name
    for use in question.get("uses", ()):
        if all(_holds(api, test, outcome) for test, outcome in use["conditions"]):
            yield from () if question.get("unreachable") else _check(api, use)
        elif question.get("unreachable"):
            yield _place(use)


def _place(use: dict[str, Any]) -> str:
    return f"line {use['line']}: {'.'.join(use['steps']).replace('.()', '()')}"


def _check(api: Any, use: dict[str, Any]) -> Iterator[str]:
    place = _place(use)
    first, *rest = use["steps"]
    found = api if first == "api" else getattr(api, CLASS_OF[first])
    for step in rest:
        if step == "()":
            found = _result(api, found)
            if found is None:  # a number, a string, a truth value: no TensorRT object
                return
        elif not hasattr(found, step):
            yield place
            return
        else:
            found = getattr(found, step)
    if use["target"] and CLASS_OF.get(use["target"]) != getattr(found, "__name__", None):
        yield f"{place} is a {found.__name__}, which no variable called '{use['target']}' may be"


def _result(api: Any, called: Any) -> Any:
    """The class that a call returns, as the binding's own signature says."""
    if isinstance(called, type):
        return called
    returned = RETURNS.search(called.__doc__ or "")
    return _reach(api, returned[1].split(".")) if returned else None


def _reach(api: Any, steps: list[str]) -> Any:
    found = api
    for step in steps:
        found = getattr(found, step, None)
    return found


def _holds(api: Any, test: str, outcome: bool) -> bool:
    """Whether code under `test` can run with these bindings. A test of something else may go either way."""
    names = {name: getattr(api, cls) for name, cls in CLASS_OF.items()}
    trt = SimpleNamespace(major=int(api.__version__.split(".")[0]))
    try:
        return bool(eval(test, {"__builtins__": {"hasattr": hasattr}, "trt": trt, "api": api, **names})) is outcome
    except (NameError, AttributeError, TypeError):
        return True


if __name__ == "__main__":
    import tensorrt_bindings

    json.dump(list(_answer(tensorrt_bindings, json.load(sys.stdin))), sys.stdout)

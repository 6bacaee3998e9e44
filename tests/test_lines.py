"""How the house is built: lines, what stays behind the door to speed, and imports that go down."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cvfp

PACKAGE = Path(cvfp.__file__).parent
HEART = (
    "model",
    "inputs",
    "phase1",
    "objectives",
    "phase2",
    "contexts",
    "recurrence",
    "metrics",
)
HEART_LINES, OPS_LINES, PACKAGE_LINES = 1100, 800, 11_900

# Low to high; a module imports from its own layer and those before it. Packages stand for all that
# is in them; modules that are not there are ignored.
LAYERS: list[list[str]] = [
    ["errors", "cache", "seeds", "progress", "share", "version"],
    ["ops"],
    ["registry", "config", "parameters"],
    list(HEART),
    ["hub", "corpora", "tokenizer", "data", "embeddings"],
    [
        "abort",
        "baselines",
        "build",
        "card",
        "checkpoint",
        "controls",
        "distributed",
        "end_to_end",
        "estimate",
        "experiment",
        "gap",
        "generation",
        "packs",
        "pretrained",
        "result",
        "store",
        "variants",
        "watch",
    ],
    ["cluster"],
    ["sweep"],
    ["tuning"],
    ["analysis", "explorer", "notebook"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))
OUTSIDE = [path for path in FILES if path.parent.name != "ops"]


def lines(*paths: Path) -> int:
    """As `wc -l` counts them."""
    return sum(path.read_bytes().count(b"\n") for path in paths)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_lines_of_the_heart_and_of_the_engine_room(capsys: pytest.CaptureFixture[str]) -> None:
    heart = {module: lines(PACKAGE / f"{module}.py") for module in HEART}
    room = {path.stem: lines(path) for path in sorted((PACKAGE / "ops").glob("*.py"))}
    with capsys.disabled():  # on stderr: pytest-xdist's workers have no stdout
        for words, counts, limit in (("heart", heart, HEART_LINES), ("ops", room, OPS_LINES)):
            each = ", ".join(f"{module} {count}" for module, count in counts.items())
            text = f"\n{words}: {sum(counts.values())} lines of {limit} ({each})"
            print(text, end="", file=sys.stderr)
        text = f"\npackage: {lines(*FILES)} lines of {PACKAGE_LINES} in {len(FILES)} files"
        print(text, file=sys.stderr)
    assert sum(heart.values()) <= HEART_LINES, heart
    assert sum(room.values()) <= OPS_LINES, room
    assert lines(*FILES) <= PACKAGE_LINES


# What stays behind the door


def faults(source: str) -> list[str]:
    """What a module outside `ops` must not hold: compiled loops, gradients by hand, buffers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            top = module.split(".")[0]
            if top in ("numba", "llvmlite", "triton"):
                found.append(f"line {node.lineno}: imports {top}")
            if module == "torch.autograd.Function" or module.startswith("torch.autograd.function"):
                found.append(f"line {node.lineno}: imports {module}")
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
            if "Function" in bases or "InplaceFunction" in bases:
                found.append(f"line {node.lineno}: {node.name} writes gradients by hand")
            if node.name.strip("_").endswith(
                ("Pool", "Room", "Buffer", "Buffers", "Tape", "Arena")
            ):
                found.append(f"line {node.lineno}: {node.name} keeps buffers")
        if isinstance(node, ast.Call) and any(word.arg == "out" for word in node.keywords):
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}(out=…) writes to a buffer")
    return sorted(set(found))


@pytest.mark.parametrize("path", OUTSIDE, ids=name)
def test_speed_stays_behind_its_door(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import numba",
        "from numba import njit",
        "def f():\n    import llvmlite.ir\n",
        "import torch\nclass A(torch.autograd.Function): ...",
        "from torch.autograd import Function\nclass A(Function): ...",
        "class _Room: ...",
        "class BufferPool: ...",
        "import torch\ntorch.mm(a, b, out=c)",
        "torch.add(a, b, alpha=2, out=buffers[0])",
    ],
)
def test_what_does_not_stay_is_found(source: str) -> None:
    assert faults(source)


def test_what_may_stand_outside_is_not_found() -> None:
    assert not faults("import torch\nfrom torch import nn\nclass A(nn.Module):\n    out = f(x=1)\n")


# Imports go down


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Lines and modules of cvfp that are imported when the code runs."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "cvfp":
                    yield node.lineno, alias.name.partition(".")[2].split(".")[0] or "__init__"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cvfp":
            inside = (node.module or "").split(".")[1:]
            for alias in node.names:
                module = inside[0] if inside else alias.name
                there = (PACKAGE / module).is_dir() or (PACKAGE / f"{module}.py").exists()
                yield node.lineno, module if inside or there else "__init__"
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(source))


def own(path: Path) -> str:
    """The module, or the package in cvfp, that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def upward(path: Path) -> list[str]:
    here = own(path)
    return [
        f"line {line}: {here} imports {there}"
        for line, there in imports(path.read_text(encoding="utf-8"))
        if there != here and RANK[there] > RANK[here]
    ]


def test_every_module_has_its_layer() -> None:
    assert {own(path) for path in FILES} <= set(RANK)
    assert len(RANK) == sum(map(len, LAYERS))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down(path: Path) -> None:
    assert not upward(path)


def test_an_import_that_goes_up_is_found() -> None:
    source = """
from typing import TYPE_CHECKING
import cvfp.sweep
from cvfp import Experiment, phase1
from cvfp.analysis.scaling import fit
if TYPE_CHECKING:
    from cvfp.gap import Gap
def f():
    from cvfp import store
"""
    found = [module for _, module in imports(source)]
    assert found == ["sweep", "__init__", "phase1", "analysis", "store"]

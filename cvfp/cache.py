"""State on disk: CVFP_HOME, content keys, files that are written whole or not at all."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import torch
from safetensors.torch import load_file, save_file


def home() -> Path:
    """The folder for all state: `CVFP_HOME`, or the user's cache folder."""
    return Path(os.environ.get("CVFP_HOME") or platformdirs.user_cache_dir("cvfp")).expanduser()


def digest(*parts: object) -> str:
    """A key for content: 20 hex digits of the SHA-256 of bytes, tensors and JSON-able values."""
    sha = hashlib.sha256()
    data: bytes | memoryview
    for part in parts:
        if isinstance(part, torch.Tensor):
            # No copy of its bytes: hashing a large table is part of every start.
            data = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        elif isinstance(part, bytes):
            data = part
        else:
            data = json.dumps(part, sort_keys=True).encode()
        # The length tells ("ab", "c") from ("a", "bc").
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()[:20]


@functools.cache
def code_fingerprint(*modules: str) -> str:
    """Digest of the modules' code, packages whole; comments, docstrings and layout do not count."""
    sources = []
    for name in modules:
        spec = importlib.util.find_spec(f"cvfp.{name}")
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin)
        files = sorted(path.parent.glob("*.py")) if path.stem == "__init__" else [path]
        sources += [file.read_text(encoding="utf-8") for file in files]
    # Parsing takes half a second: its result is cached under the digest of the text.
    path = home() / "code" / digest(sources, list(sys.version_info))
    if not path.exists():
        with whole(path) as temporary:
            temporary.write_text(digest([normalised(source) for source in sources]))
    return path.read_text()


def normalised(source: str) -> str:
    """The source's AST as text, without docstrings and positions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` if the block does not raise: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def tensors(
    kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors cached as `kind` and `key`; `make` computes them the first time."""
    return load_file(tensor_file(kind, key, make))


def tensor_file(kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> Path:
    """The safetensors file of the same."""
    path = home() / kind / f"{key}.safetensors"
    if not path.exists():
        contents = {name: tensor.contiguous() for name, tensor in make().items()}
        with whole(path) as temporary:
            save_file(contents, temporary)
    return path

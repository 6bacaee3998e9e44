"""Where state lives and how it gets there: CVFP_HOME, content keys, files that appear whole."""

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
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()[:20]


@functools.cache
def code_fingerprint(*modules: str) -> str:
    """Digest of the modules' code: comments, docstrings and layout do not count."""
    sources = []
    for name in modules:
        spec = importlib.util.find_spec(f"cvfp.{name}")
        assert spec is not None
        assert spec.origin is not None
        sources.append(Path(spec.origin).read_text(encoding="utf-8"))
    # Parsing takes half a second: it is done once for the same text.
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
    """A temporary path that becomes `path` when the block ends well: never half a file."""
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
    """The tensors kept under `kind` and `key`, made by `make` and kept if they are not there."""
    return load_file(kept(kind, key, make))


def kept(kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> Path:
    """The file of those tensors."""
    path = home() / kind / f"{key}.safetensors"
    if not path.exists():
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        with whole(path) as temporary:
            save_file(made, temporary)
    return path

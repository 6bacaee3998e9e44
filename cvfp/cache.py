"""State on disk: CVFP_HOME, content keys, files written whole and checked when they are read."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import platformdirs
import torch
import xxhash
from filelock import BaseFileLock, FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Value = TypeVar("Value")
Tensors = dict[str, torch.Tensor]
_alive: dict[tuple[Path, int], BaseFileLock] = {}


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
            flat = part.detach().cpu().contiguous().as_strided([part.numel()], [1])
            data = flat.view(torch.uint8).numpy().data
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
    package = Path(__file__).parent
    for name in modules:
        files = sorted((package / name).glob("*.py")) or [package / f"{name}.py"]
        sources += [file.read_text(encoding="utf-8") for file in files]
    # Parsing takes half a second: its result is cached under the digest of the text.
    key = digest(sources, list(sys.version_info))
    return text("code", key, lambda: digest([normalised(source) for source in sources]))


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
    # A folder, for safetensors has a temporary file of its own beside what it writes.
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix()))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(path: Path, write: Callable[[Path], object]) -> bool:
    """Keep what `write` writes to the path it is given; False, and a warning, where that fails."""
    try:
        with whole(checksum_file(path)) as digits, whole(path) as temporary:
            write(temporary)
            digits.write_bytes(checksum(temporary, path))
            checksum_file(path).unlink(missing_ok=True)  # none beside another content
    except (OSError, SafetensorError):
        _tell(home(), "with space that can be written; what this process makes is not all kept")
        return False
    return True


def sound(path: Path) -> bool:
    """Whether a file is there as it was kept; a damaged one is set aside with a warning."""
    with suppress(OSError):  # it is not there, or the home cannot be written
        wanted = checksum_file(path).read_bytes()
        found = checksum(path, path)
        if found in (wanted, checksum_file(path).read_bytes()):  # replaced meanwhile
            return True
        warnings.warn(f"{path}: damaged; set aside as *.damaged, and made again", stacklevel=2)
        os.replace(path, path.with_name(f"{path.name}.damaged"))
    return False


def delete(path: Path) -> None:
    with suppress(OSError):  # a home that cannot be written
        for one in (path, checksum_file(path)):
            one.unlink(missing_ok=True)


def evict(folder: Path, most: int) -> None:
    """Delete the least recently used keys of a folder until it holds at most so many bytes."""
    kept = []
    for key in {path.name.partition(".")[0] for path in folder.glob("[!.]*")}:
        files = sorted(folder.glob(f"{key}.*"))  # halves and damaged ones, too
        with suppress(FileNotFoundError):  # another process was quicker
            status = [one.stat() for one in files]
            used = max((one.st_mtime for one in status), default=0.0)  # all gone meanwhile
            kept.append((used, sum(one.st_size for one in status), files))
    total = sum(size for _, size, _ in kept)
    for _, size, oldest in sorted(kept):
        if total <= most:
            break
        total -= size
        for one in oldest:
            delete(one)


def checksum_file(path: Path) -> Path:
    """Where the checksum of `kind/name` is; a file without one counts as not there."""
    return path.parents[1] / "checksums" / path.parent.name / path.name


def checksum(file: Path, path: Path) -> bytes:
    """Of a file and of the path it is kept as: another key's file does not match."""
    name = f"{path.parent.name}/{path.name}".encode()
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: xxhash.xxh3_128(name)).digest()


def obtain(
    path: Path,
    make: Callable[[], Value],
    write: Callable[[Path, Value], object],
    read: Callable[[Path], Value],
) -> Value:
    """What is kept as `path`; made and kept first by one of the processes that want it."""
    if not sound(path):
        with alone(path):
            if not sound(path):
                made = make()
                keep(path, lambda temporary: write(temporary, made))
                return made
    return read(path)


def tensors(kind: str, key: str, make: Callable[[], Tensors]) -> Tensors:
    """The tensors kept as `kind` and `key`; `make` computes them the first time."""
    return obtain(home() / kind / f"{key}.safetensors", make, save, load_file)


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata)


def text(kind: str, name: str, make: Callable[[], str]) -> str:
    """The same for a text."""
    path = home() / kind / name
    return obtain(path, lambda: make().encode(), Path.write_bytes, Path.read_bytes).decode()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time is in here for a file; one that dies lets the next in."""
    with ExitStack() as held:
        try:
            held.enter_context(_lock(f"{path.parent.name}-{path.name}"))
        except OSError:
            if os.access(home() / "locks", os.W_OK):  # else there is a warning already
                _tell(home(), "with file locks; processes do not wait for each other now")
        yield


def temporary_prefix() -> str:
    """Of this process's temporary files; the lock of that name tells others that it lives."""
    mine = _alive.setdefault((home(), os.getpid()), _lock(f".cvfp-{secrets.token_hex(8)}"))
    with suppress(OSError):
        mine.acquire()
    return Path(mine.lock_file).name


def check_home() -> None:
    """Warn now if the home cannot be written, and delete what dead processes left in it."""
    keep(home() / "code" / "probe", lambda path: path.write_bytes(bytes(2**16)))
    # In phase1 an earlier version's, too; the locks last, since they tell who lives.
    for pattern in ("[!l]*/.cvfp-*", "checksums/*/.cvfp-*", "phase1/.[!c]*", "locks/.*"):
        for path in home().glob(pattern):
            with suppress(OSError), _lock(path.name[: len(temporary_prefix())], 0):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def reserve(file: Path | str, size: int) -> None:
    """Take a file's space on the disk before it is mapped; OSError: it is full. Writing to a mapped
    file would then kill the process."""
    with open(file, "r+b") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        opened.truncate(size)


def _lock(name: str, timeout: float = -1) -> BaseFileLock:
    with suppress(OSError):
        (home() / "locks").mkdir(parents=True, exist_ok=True)
    path = home() / "locks" / name
    return FileLock(path, timeout, thread_local=False, fallback_to_soft=False)


@functools.cache
def _tell(folder: Path, accepted: str) -> None:
    """Warn, once a process."""
    warnings.warn(f"CVFP_HOME: got {str(folder)!r}; accepted: a folder {accepted}", stacklevel=4)

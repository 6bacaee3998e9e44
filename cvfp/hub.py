"""The Hugging Face hub, and local folders laid out like its repositories."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cvfp.config import ParameterError

Loaded = TypeVar("Loaded")


def local(name: str) -> Path | None:
    """The file or folder that `name` is the path of; None where there is none."""
    path = os.path.expanduser(name)
    return Path(path) if os.path.exists(path) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` could be a hub id: "name" or "owner/name"."""
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~"))


def signature(path: Path) -> list[Any]:
    """Names, sizes and times of a file, or of all files of a folder: changes when one does."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    status = [(str(file.resolve()), file.stat()) for file in files]
    return [(name, one.st_size, one.st_mtime_ns) for name, one in status]


def require_hub(parameter: str, name: str) -> None:
    """Raise at once if the hub cannot be reached (its own client retries for a minute)."""
    from huggingface_hub import constants

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        if offline:
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(constants.ENDPOINT, timeout=10):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        accepted = f"a local path, or a hub that can be reached ({error})"
        raise ParameterError(parameter, name, accepted) from error


def rows(dataset: str, config: str | None, split: str, parameter: str) -> Iterator[dict[str, Any]]:
    """Rows of one split of a hub dataset, streamed: no more is downloaded than is read.

    Args:
        parameter: the Experiment's field that names the split.

    Raises:
        ParameterError: no such dataset or split, or one that cannot be read.
    """
    import datasets  # takes a second, and local files do without

    try:
        yield from datasets.load_dataset(path=dataset, name=config, split=split, streaming=True)
    except ValueError as error:
        if "split" in str(error).lower():
            raise ParameterError(parameter, split, str(error)) from error
        raise ParameterError("dataset", dataset, str(error)) from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        accepted = f"a dataset that can be read ({type(error).__name__}: {error})"
        raise ParameterError("dataset", dataset, accepted) from error


def files(folder: Path, config: str | None, split: str, parameter: str) -> list[Path]:
    """The files of one split of a local folder, as `datasets` tells them from names or README.

    Raises:
        ParameterError: no such split, or no files that `datasets` knows.
    """
    import datasets

    with _without_wildcards(folder) as plain:
        try:
            builder = datasets.load_dataset_builder(str(plain), name=config)
        except (OSError, ValueError) as error:
            raise ParameterError("dataset", str(folder), str(error)) from error
        splits = {str(name): list(names) for name, names in builder.config.data_files.items()}
        if split not in splits:
            raise ParameterError(parameter, split, "one of the splits " + ", ".join(splits))
        return [folder / Path(name).relative_to(plain) for name in splits[split]]


@contextlib.contextmanager
def _without_wildcards(folder: Path) -> Iterator[Path]:
    """A path to the folder's files in which `datasets` finds no pattern: it globs what it gets."""
    folder = folder.resolve()
    if not re.search(r"[*?[\]{}]|::", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name).resolve()
        for file in (path for path in folder.rglob("*") if path.is_file()):
            link = plain / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
        yield plain


def pretrained(parameter: str, name: str, load: Callable[[str, bool], Loaded]) -> Loaded:
    """Load a local folder, a hub id from the hub's cache, or one to download.

    The last four are held in memory.

    Args:
        parameter: the Experiment's field that `name` is the value of.
        load: called with the name or path and `local_files_only`.

    Raises:
        ParameterError: nothing of that name that `load` can read.
    """
    path = local(name)
    return _pretrained(parameter, name, load, tuple(signature(path)) if path else ())


@functools.lru_cache(maxsize=4)
def _pretrained(
    parameter: str, name: str, load: Callable[[str, bool], Loaded], files: tuple[Any, ...]
) -> Loaded:
    path = local(name)
    try:
        if path is not None:
            return load(str(path), True)
        if not is_hub_id(name):
            raise ParameterError(parameter, name, "a folder that exists, or a hub id")
        try:
            return load(name, True)
        except (OSError, ValueError):
            require_hub(parameter, name)
            return load(name, False)
    except ParameterError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        accepted = f"a hub id or folder that transformers can load ({reason})"
        raise ParameterError(parameter, name, accepted) from error

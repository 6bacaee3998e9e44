"""Finished runs: read from the store, and carried from one to another in packs, checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from cvfp import cache, config
from cvfp.config import HINTS, ParameterError
from cvfp.result import Result, Results

KINDS = ("runs", "models", "baselines", "claims")  # tables and contexts are made again
NAME = re.compile(rf"(?:checksums/)?({'|'.join(KINDS)})/[0-9A-Za-z]([\w.-]{{0,98}}\w)?")
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


def pack(file: Path) -> int:
    """Write what is sound of the store's finished runs into one file; how many runs that is. Raises
    `ParameterError`: there are none, or the file is there and is no pack."""
    sound = [path for kind in KINDS for path in _kept(kind)]
    runs = sum(path.parent.name == "runs" for path in sound)
    if not runs:
        raise ParameterError("CVFP_HOME", str(cache.home()), "a folder with finished runs")
    if file.exists() and not zipfile.is_zipfile(file):
        raise ParameterError("FILE", str(file), "a new file, or a pack to replace")
    with cache.whole(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as z:
        for path in (one for p in sound for one in (p, cache.checksum_file(p))):
            z.write(path, path.relative_to(cache.home()))
    return runs


@contextmanager
def opened(file: Path) -> Iterator[tuple[list[Path], int]]:
    """A pack's sound entries as files in a temporary folder, and how many were refused: damaged,
    not named as in a store, or runs that are no run of their name. Raises `ParameterError`: it is
    no pack."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(file) as made:
                names = [name for name in made.namelist() if not name.endswith("/")]
                good = [name for name in names if NAME.fullmatch(name)]
                for name in good:
                    with suppress(*DAMAGE):  # not there, below
                        made.extract(name, folder)
        except (OSError, zipfile.BadZipFile) as error:
            accepted = f"a file of `python -m cvfp pack` ({error})"
            raise ParameterError("FILE", str(file), accepted) from None
        paths = [path for kind in KINDS for path in sorted((Path(folder) / kind).glob("*"))]
        sound = [path for path in paths if _sound(path)]
        wanted = sum(not name.startswith("checksums/") for name in good)
        yield sound, len(names) - len(good) + wanted - len(sound)


def unpack(file: Path) -> tuple[int, int]:
    """Put a pack's runs into the store, which keeps what it has; how many are new, how many entries
    were refused. Raises `ParameterError`: it is no pack, or the store cannot be written."""
    new = 0
    with opened(file) as (paths, refused):
        for path in paths:
            kept = cache.home() / path.parent.name / path.name
            if cache.sound(kept):
                continue
            if not cache.keep(kept, partial(shutil.copyfile, path)):
                raise ParameterError("CVFP_HOME", str(cache.home()), "a folder with room to write")
            new += path.parent.name == "runs"
    return new, refused


def results(pack: Path | None = None, /, **fields: Any) -> Results:
    """The store's finished runs in the order they were kept, or those of a pack, whose fields have
    the values given, each one or a list: `results(seed=0, samples=[50, 100])`. What cannot be read
    (damaged, another version's, with own parts not registered here) is left out with a warning.

    Raises `ParameterError`: an unknown field, a value it cannot have, a file that is no pack."""
    wanted = {name: _values(name, value) for name, value in fields.items()}
    kept = [] if pack else sorted(_kept("runs"), key=os.path.getmtime)
    with opened(pack) if pack else nullcontext((kept, 0)) as (paths, _):
        read = [_read(path) for path in paths if path.parent.name == "runs"]
    if skipped := read.count(None):
        words = f"{skipped} of {len(read)} runs cannot be read here: another version's, or with"
        warnings.warn(f"{cache.home()}: {words} parts not registered here", stacklevel=2)
    found = [one for one in read if one is not None]
    for name, values in wanted.items():
        found = [one for one in found if getattr(one.experiment, name) in values]
    return Results(found)


def _values(name: str, value: Any) -> list[Any]:
    if name not in HINTS:
        raise ParameterError(name, "an unknown field", config.nearest(name, HINTS))
    several = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return [config._typed(name, config.parse(one, HINTS[name]), HINTS[name]) for one in several]


def _kept(kind: str) -> list[Path]:
    """The store's sound files of a kind."""
    paths = sorted((cache.home() / kind).glob("[!.]*"))
    return [path for path in paths if path.suffix != ".damaged" and cache.sound(path)]


def _sound(path: Path) -> bool:
    checksum = cache.checksum_file(path)
    if not checksum.exists() or cache.checksum(path, path) != checksum.read_bytes():
        return False
    return path.parent.name != "runs" or _read(path) is not None


def _read(path: Path) -> Result | None:
    """A run's file; None: it is no run of that name."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        result = Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
        result.from_store = True
        return result if result.key == path.stem else None
    return None

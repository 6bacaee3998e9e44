"""Packs: finished runs carried from one store to another, checked on the way."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from cvfp import cache
from cvfp.config import ParameterError
from cvfp.result import Result

KINDS = ("runs", "models", "baselines", "claims")  # tables and contexts are made again
NAME = re.compile(rf"(?:checksums/)?({'|'.join(KINDS)})/[0-9A-Za-z]([\w.-]{{0,98}}\w)?")
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


def pack(file: Path) -> int:
    """Write what is sound of the store's finished runs into one file; how many runs that is.

    Raises:
        ParameterError: there are none, or the file is there and is no pack.
    """
    paths = [p for kind in KINDS for p in sorted((cache.home() / kind).glob("[!.]*"))]
    sound = [path for path in paths if path.suffix != ".damaged" and cache.sound(path)]
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
    not named as in a store, or runs that are no run of their name.

    Raises:
        ParameterError: it is no pack.
    """
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


def results(file: Path) -> list[Result]:
    """The Results of a pack's runs, each once. Raises `ParameterError`: it is no pack."""
    with opened(file) as (paths, _):
        runs = [path for path in paths if path.parent.name == "runs"]
        return [Result.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in runs]


def _sound(path: Path) -> bool:
    checksum = cache.checksum_file(path)
    if not checksum.exists() or cache.checksum(path, path) != checksum.read_bytes():
        return False
    if path.parent.name != "runs":
        return True
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return bool(Result.from_dict(record).key == path.stem)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False

"""The Hugging Face hub, and local folders laid out like its repositories."""

from __future__ import annotations

import functools
import os
import re
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cvfp.config import ParameterError

Loaded = TypeVar("Loaded")

# Words in the names of files and folders that tell a split, as `datasets` has them.
SPLITS = dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
SPLITS |= dict.fromkeys(("train", "training"), "train")


def local(name: str) -> Path | None:
    """The file or folder that `name` is the path of; None where there is none."""
    there = (path for path in (name, os.path.expanduser(name)) if os.path.exists(path))
    return next(map(Path, there), None)


def is_hub_id(name: str) -> bool:
    """Whether `name` could be a hub id: "name" or "owner/name"."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and len(name) <= 96


def signature(path: Path, below: str = "*") -> list[Any]:
    """Names, sizes and times of a file, or of a folder's files (with "**/*" all below it, but not
    below one that is or holds the home folder: that may be the disk); changes when one does."""
    if below != "*" and Path.home().resolve().is_relative_to(path.resolve()):
        raise ParameterError("dataset", str(path), "a folder of its own for the corpus")
    files = [path] if path.is_file() else sorted(p for p in path.glob(below) if p.is_file())
    status = [(str(file.resolve()), file.stat()) for file in files]
    return [(name, one.st_size, one.st_mtime_ns) for name, one in status]


def require_hub(parameter: str, name: str) -> None:
    """Raise at once if the hub cannot be reached (its own client retries for a minute)."""
    from huggingface_hub import constants

    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        accepted = f"a local path, or a hub that can be reached ({error})"
        raise ParameterError(parameter, name, accepted) from error


def rows(dataset: str, config: str | None, split: str, parameter: str) -> Iterator[dict[str, Any]]:
    """Rows of one split of a hub dataset, streamed: no more is downloaded than is read. `parameter`
    is the Experiment's field that names the split. Raises `ParameterError`: no such dataset or
    split, or one that cannot be read."""
    import datasets  # takes a second, and local files do without

    try:
        yield from datasets.load_dataset(path=dataset, name=config, split=split, streaming=True)
    except ValueError as error:
        got = (parameter, split) if "split" in str(error).lower() else ("dataset", dataset)
        raise ParameterError(*got, str(error)) from error
    except (OSError, TypeError, datasets.exceptions.DatasetsError) as error:
        accepted = f"a dataset that can be read ({type(error).__name__}: {error})"
        raise ParameterError("dataset", dataset, accepted) from error


def files(
    path: Path, config: str | None, split: str, parameter: str, suffixes: Collection[str]
) -> list[Path]:
    """The file, or those of one split of a local folder, as README.md tells the splits, or else the
    names of files and folders: train, validation (valid, val, dev), test (eval), or what stands
    before -00000-of-00001; where no name tells one, all are for training. `suffixes` is what they
    end in, without .gz. Raises `ParameterError`: no such split, configuration or files, or it is
    unclear which are meant."""
    if not path.is_dir():
        return [path]
    base, patterns = _declared(path, config)
    there = [file for file in sorted(base.rglob("*")) if file.is_file()]
    splits: dict[str, list[Path]] = {}
    for name, globs in patterns.items():
        splits[name] = [p for glob in globs for p in sorted({*base.glob(glob)} & {*there})]
    for file in () if patterns else there:
        within = file.relative_to(base)
        if suffix(file) in suffixes and not re.search(r"(^|/)(\.|__)", within.as_posix()):
            splits.setdefault(_split(within), []).append(file)
    if not any(splits.values()):
        endings = ", ".join(sorted({file.suffix for file in there})) or "nothing"
        accepted = f"a folder of {', '.join(suffixes)} files (there: {endings})"
        raise ParameterError("dataset", str(path), accepted)
    unknown = splits.pop("", [])
    if not splits:
        splits, unknown = {"train": unknown}, []
    if split not in splits:
        raise ParameterError(parameter, split, "one of the splits " + ", ".join(splits))
    kinds = {suffix(file): file.name for file in splits[split]}
    if ".txt" in kinds and len(kinds) > 1 and not patterns:  # a licence, say, among the data
        accepted = f"a folder of .txt files, or of files with rows ({', '.join(kinds.values())})"
        raise ParameterError("dataset", str(path), accepted)
    if left := [file.name for file in unknown if suffix(file) in kinds]:
        accepted = f"a folder where each file's name tells its split ({left[0]} does not)"
        raise ParameterError("dataset", str(path), accepted)
    return splits[split]


def suffix(path: Path) -> str:
    """What a file's name ends in, in lower case and without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _split(name: Path) -> str:
    """The split that the name of a file or of its folders tells, empty where none does."""
    if shard := re.match(r"(.+)-\d{5}-of-\d{5}", name.name):
        return shard[1]
    words = re.findall(r"[^\W\d_]+", name.as_posix().lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")


def _declared(folder: Path, config: str | None) -> tuple[Path, dict[str, list[str]]]:
    """The folder of a configuration and its patterns by split, where README.md has them."""
    readme = folder / "README.md"
    if not readme.is_file() and config is None:
        return folder, {}
    import huggingface_hub
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    try:
        card = huggingface_hub.metadata_load(readme) or {}
        configs = MetadataConfigs.from_dataset_card_data(card)
        name = configs.get_default_config_name() if config is None else config
        if name not in configs and (configs or config is not None):
            raise ValueError(f"{name!r} is none of {', '.join(configs)}")
        chosen = configs.get(name, {})
        patterns = sanitize_patterns(chosen["data_files"]) if "data_files" in chosen else {}
        return folder / chosen.get("data_dir", ""), patterns
    except Exception as error:  # yaml has its own classes
        accepted = f"a configuration that README.md has ({type(error).__name__}: {error})"
        raise ParameterError("dataset_config", config, accepted) from error


def pretrained(parameter: str, name: str, load: Callable[[str, bool], Loaded]) -> Loaded:
    """Load a local folder, a hub id from the hub's cache, or one to download (held in memory: 4);
    `load` is called with the name or path and `local_files_only`. Raises `ParameterError` of
    `parameter`, the field that `name` is the value of: nothing of that name that can be read."""
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
    except Exception as error:  # tokenizers and safetensors raise no narrower one
        reason = " ".join(str(error).split())[:200]
        accepted = f"a hub id or folder that transformers can load ({reason})"
        raise ParameterError(parameter, name, accepted) from error

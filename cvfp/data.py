"""Conversations to token streams (SPEC §1)."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
from torch import Tensor

from cvfp import cache
from cvfp.config import Experiment, ParameterError

CHITCHAT_HELD_OUT = 50
CHITCHAT_FITTING = 500
CHITCHAT_MIN_CHARACTERS = 250

FITTED_TABLES = ("bigram", "ppmi")

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Corpus:
    """Texts of the samples, by role; no text of `validation` occurs in the other two."""

    train: list[str]
    validation: list[str]  # empty with validation="tail"
    fitting: list[str]  # empty where nothing is fitted


@dataclass(frozen=True)
class Stream:
    """Tokens of concatenated samples: `tokens` int64 [T], `starts` the samples' first positions."""

    tokens: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Data:
    """What both phases and the baselines read."""

    train: Stream
    validation: Stream
    fitting: Stream
    tokenizer: Tokenizer
    fingerprint: str  # of the three streams and the tokeniser

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


class Tokenizer:
    """A `tokenizers.Tokenizer` with what the kit needs of it: streams in, text and bytes out."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _tokenizer_from_json, (self.backend.to_str(),)

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self.backend.get_vocab().values())

    @cached_property
    def fingerprint(self) -> str:
        return cache.digest(self.backend.to_str())

    def encode(self, texts: list[str]) -> Stream:
        """One stream of all `texts`, each tokenised whole, without special tokens."""
        ids = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(i) for i in ids], dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
        starts = np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64)[: len(ids)]
        return Stream(torch.from_numpy(flat), torch.from_numpy(starts))

    def decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens, skip_special_tokens=False)

    def pieces(self, tokens: list[int]) -> list[str]:
        """Each token as text of its own (a token can be part of a character: shown as �)."""
        return [self.decode([token]) for token in tokens]

    def count_bytes(self, tokens: Tensor) -> int:
        """UTF-8 bytes that `tokens` stand for; exact for byte-level tokenisers at any cut."""
        if isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel):
            return int(self._bytes_per_token[tokens].sum())
        return len(self.decode(tokens.tolist()).encode())

    @cached_property
    def _bytes_per_token(self) -> Tensor:
        # Byte-level vocabularies write each byte as one character.
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        for piece, index in self.backend.get_vocab().items():
            lengths[index] = len(piece)
        return lengths


def _tokenizer_from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))


def load(experiment: Experiment) -> Data:
    """The token streams of an Experiment; texts, fitted tokenisers and tokens are cached on disk.

    Raises:
        ParameterError: a file, column, split or hub that is not there, a size that exceeds the
            corpus, a sample of fewer than two tokens.
    """
    paths = [Path(name).expanduser() for name in (experiment.dataset, experiment.tokenizer)]
    files = [tuple(signature(path)) for path in paths if path.exists()]
    only = Experiment(**experiment.to_dict("data"))
    return _load(only, cache.home(), tuple(files))


@functools.lru_cache(maxsize=8)  # to read, hash and check megabytes again takes a tenth of a second
def _load(experiment: Experiment, home: Path, files: tuple[Any, ...]) -> Data:
    corpus = load_corpus(experiment)
    tokenizer = load_tokenizer(experiment, corpus.fitting)
    train, validation, fitting = (
        _encode(tokenizer, texts, experiment.dataset, role) for role, texts in vars(corpus).items()
    )
    if experiment.validation == "tail":
        train, validation = _split_tail(train)
        if len(validation) < 2:
            raise ParameterError(
                "samples", experiment.samples, "enough for a tail (10 %) of at least 2 tokens"
            )
    parts = [part for s in (train, validation, fitting) for part in (s.tokens, s.starts)]
    fingerprint = cache.digest(tokenizer.fingerprint, *parts)
    return Data(train, validation, fitting, tokenizer, fingerprint)


def load_corpus(experiment: Experiment) -> Corpus:
    """The texts of an Experiment's samples in their fixed order."""
    if experiment.dataset == "chitchat":
        return _chitchat(experiment)
    held_out = experiment.validation_samples if experiment.validation == "held_out" else 0
    fitted = experiment.fitting_samples if _fits(experiment) else 0
    own_split = experiment.validation_split is not None and not _is_file(experiment.dataset)
    if own_split:
        validation = _read(experiment, str(experiment.validation_split), held_out)
        _enough("validation_samples", held_out, len(validation), experiment.dataset)
        start = 0
    else:
        validation = _read(experiment, experiment.train_split, held_out)
        _enough("validation_samples", held_out, len(validation), experiment.dataset)
        start = held_out
    seen = set(validation)
    wanted = fitted + experiment.samples
    asked = start + wanted
    while True:
        rows = _read(experiment, experiment.train_split, asked)
        # A copy of a held-out conversation in training would be a leak.
        rest = [text for text in rows[start:] if text not in seen][:wanted]
        if len(rest) == wanted:
            break
        if len(rows) < asked:
            name = "samples" if len(rest) > fitted else "fitting_samples"
            taken = fitted if name == "samples" else 0
            _enough(name, getattr(experiment, name), len(rest) - taken, experiment.dataset)
        asked += wanted - len(rest)
    return Corpus(rest[fitted:], validation, rest[:fitted])


def _fits(experiment: Experiment) -> bool:
    return experiment.tokenizer == "bpe" or experiment.embedding in FITTED_TABLES


def _enough(parameter: str, wanted: int, found: int, dataset: str) -> None:
    if found < wanted:
        raise ParameterError(parameter, wanted, f"at most {found} with dataset {dataset!r}")


def _chitchat(experiment: Experiment) -> Corpus:
    """The embedded corpus: 50 held out, 500 to fit on, the rest to train on."""
    for parameter, most in (
        ("validation_samples", CHITCHAT_HELD_OUT),
        ("fitting_samples", CHITCHAT_FITTING),
    ):
        _enough(parameter, getattr(experiment, parameter), most, "chitchat")
    for parameter in ("column", "dataset_config", "validation_split", "train_split"):
        default = "train" if parameter == "train_split" else None
        if getattr(experiment, parameter) != default:
            accepted = f"{default!r} with dataset 'chitchat'"
            raise ParameterError(parameter, getattr(experiment, parameter), accepted)
    version = importlib.metadata.version("chitchat-dataset")
    code = cache.code_fingerprint("data")
    texts = _kept_texts(f"chitchat-{version}-{code}", _chitchat_texts)
    first = CHITCHAT_HELD_OUT + CHITCHAT_FITTING
    _enough("samples", experiment.samples, len(texts) - first, "chitchat")
    return Corpus(
        train=texts[first : first + experiment.samples],
        validation=texts[: experiment.validation_samples]
        if experiment.validation == "held_out"
        else [],
        fitting=texts[CHITCHAT_HELD_OUT:][: experiment.fitting_samples]
        if _fits(experiment)
        else [],
    )


def _chitchat_texts() -> list[str]:
    spec = importlib.util.find_spec("chitchat_dataset")
    assert spec is not None
    assert spec.origin is not None
    with open(Path(spec.origin).with_name("dataset.json"), encoding="utf-8") as file:
        conversations: dict[str, Any] = json.load(file)
    # The order of the digests of the ids is fixed, and tied neither to time nor to length.
    order = sorted(conversations, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    texts = (
        "\n".join(
            " ".join(utterance["text"] for utterance in turn)
            for turn in conversations[name]["messages"]
        )
        for name in order
    )
    return [text for text in texts if len(text) >= CHITCHAT_MIN_CHARACTERS]


def _kept_texts(key: str, make: Any) -> list[str]:
    path = cache.home() / "corpora" / f"{key}.parquet"
    if not path.exists():
        table = pa.table({"text": pa.array(make(), pa.string())})
        with cache.whole(path) as temporary:
            pq.write_table(table, temporary)
    return _texts(path)


def _texts(path: Path) -> list[str]:
    texts: list[str] = pq.ParquetFile(path).read(["text"]).column(0).to_pylist()
    return texts


def _is_file(dataset: str) -> bool:
    return Path(dataset).expanduser().suffix in (".jsonl", ".parquet")


def _read(experiment: Experiment, split: str, count: int) -> list[str]:
    """The first `count` samples (or all there are) of one split, no more of it downloaded."""
    path = Path(experiment.dataset).expanduser()
    if count == 0:
        return []
    config = experiment.dataset_config
    if _is_file(experiment.dataset):
        if not path.is_file():
            raise ParameterError("dataset", experiment.dataset, "a file that exists")
        kind = "json" if path.suffix == ".jsonl" else "parquet"
        arguments: dict[str, Any] = dict(path=kind, data_files=str(path))
        return _read_kept(experiment, "train", count, signature(path), arguments)
    if path.is_dir():
        arguments = dict(path=str(path), name=config)
        return _read_kept(experiment, split, count, signature(path), arguments)
    if not _could_be_hub_id(experiment.dataset):
        accepted = "'chitchat', a hub id, a folder, or a .jsonl or .parquet file that exists"
        raise ParameterError("dataset", experiment.dataset, accepted)
    return _read_kept(experiment, split, count, None, dict(path=experiment.dataset, name=config))


def signature(path: Path) -> list[Any]:
    """What changes when a file, or any file of a folder, does: names, sizes and times."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    status = [(str(file.resolve()), file.stat()) for file in files]
    return [(name, one.st_size, one.st_mtime_ns) for name, one in status]


def _read_kept(
    experiment: Experiment,
    split: str,
    count: int,
    files: list[Any] | None,
    arguments: dict[str, Any],
) -> list[str]:
    """Samples read once and kept: importing `datasets` alone takes seconds.

    Args:
        files: signature of local files; None: from a hub.
    """
    name = "local" if files is not None else experiment.dataset.replace("/", "--")
    where = [experiment.dataset, experiment.dataset_config, split, experiment.column]
    local = [] if files is None else [files, cache.code_fingerprint("data")]
    key = f"{name}-{cache.digest(*where, *local)}"
    kept = sorted((cache.home() / "corpora").glob(f"{key}-*.parquet"), key=_kept_count)
    for path in kept:
        texts = _texts(path)
        # Fewer than were asked for when it was made: the split ends there.
        if len(texts) >= count or len(texts) < _kept_count(path):
            return texts[:count]
    if files is None:
        require_hub("dataset", experiment.dataset)
    return _kept_texts(f"{key}-{count}", lambda: list(_stream(experiment, split, count, arguments)))


def _kept_count(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def _stream(
    experiment: Experiment, split: str, count: int, arguments: dict[str, Any]
) -> Iterator[str]:
    import datasets  # takes a second, and the embedded corpus does without

    try:
        rows = datasets.load_dataset(split=split, streaming=True, **arguments)
        columns = list(rows.column_names or next(iter(rows)))
    except ValueError as error:
        if "split" in str(error).lower():
            parameter = (
                "validation_split" if split == experiment.validation_split else "train_split"
            )
            raise ParameterError(parameter, split, str(error)) from error
        raise ParameterError("dataset", experiment.dataset, str(error)) from error
    except (OSError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        accepted = f"a dataset that can be read ({type(error).__name__}: {error})"
        raise ParameterError("dataset", experiment.dataset, accepted) from error
    column = experiment.column or next((c for c in ("messages", "text") if c in columns), None)
    if column is None or column not in columns:
        raise ParameterError("column", column, "one of " + ", ".join(columns))
    for number, row in enumerate(rows.take(count)):
        text = _sample_text(row[column], column, columns)
        if not text:
            accepted = f"samples that are not empty (sample {number} of split {split!r} is)"
            raise ParameterError("dataset", experiment.dataset, accepted)
        yield text


def _sample_text(value: Any, column: str, columns: list[str]) -> str:
    """A conversation as one text: its messages' contents joined by a line break (SPEC §1)."""
    if isinstance(value, str):
        return value
    try:
        return "\n".join(message["content"] for message in value)
    except (TypeError, KeyError) as error:
        accepted = (
            "a column of text, or of lists of messages with 'content' "
            f"(columns: {', '.join(columns)})"
        )
        raise ParameterError("column", column, accepted) from error


def _could_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~"))


def require_hub(parameter: str, name: str) -> None:
    """Raise at once if the Hugging Face hub cannot be reached (its client retries for a minute)."""
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


def pretrained(parameter: str, name: str, load: Callable[[str, bool], Loaded]) -> Loaded:
    """`load(name, local_files_only)` for a local folder, a cached hub id, or one to download; the
    last few are kept in memory."""
    path = Path(name).expanduser()
    files = signature(path) if path.exists() else []
    return _pretrained(parameter, name, load, tuple(files))


@functools.lru_cache(maxsize=4)
def _pretrained(
    parameter: str, name: str, load: Callable[[str, bool], Loaded], files: tuple[Any, ...]
) -> Loaded:
    path = Path(name).expanduser()
    try:
        if path.exists():
            return load(str(path), True)
        if not _could_be_hub_id(name):
            raise ParameterError(parameter, name, "a folder that exists, or a hub id")
        try:
            return load(name, True)
        except (OSError, ValueError):
            require_hub(parameter, name)
            return load(name, False)
    except (OSError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        reason = str(error).splitlines()[0]
        accepted = f"a hub id or folder that transformers can load ({reason})"
        raise ParameterError(parameter, name, accepted) from error


def load_tokenizer(experiment: Experiment, fitting: list[str]) -> Tokenizer:
    """'bpe' fitted on `fitting`, or a pretrained fast tokeniser."""
    if experiment.tokenizer == "bpe":
        assert experiment.vocab_size is not None
        return fit_bpe(fitting, experiment.vocab_size)

    name, path = experiment.tokenizer, Path(experiment.tokenizer).expanduser()
    tokenizer = _local_tokenizer(name, path) if path.exists() else _pretrained_tokenizer(name)
    if tokenizer is None:
        raise ParameterError("tokenizer", experiment.tokenizer, "one with a fast implementation")
    if experiment.vocab_size not in (None, tokenizer.vocab_size):
        accepted = f"None, or {tokenizer.vocab_size} with tokenizer {experiment.tokenizer!r}"
        raise ParameterError("vocab_size", experiment.vocab_size, accepted)
    return tokenizer


def _pretrained_tokenizer(name: str) -> Tokenizer | None:
    return pretrained("tokenizer", name, _from_transformers)


def _local_tokenizer(name: str, path: Path) -> Tokenizer | None:
    """A tokeniser of a folder, kept as `tokenizers` reads it: importing transformers takes longer
    than all else that stands before training."""
    key = cache.digest(signature(path), cache.code_fingerprint("data"), tokenizers.__version__)
    kept = cache.home() / "tokenizers" / f"{key}.json"
    if not kept.exists():
        made = _pretrained_tokenizer(name)
        if made is None:
            return None
        with cache.whole(kept) as temporary:
            made.backend.save(str(temporary))
    return _tokenizer_from_json(kept.read_text(encoding="utf-8"))


def _from_transformers(name: str, local: bool) -> Tokenizer | None:
    """None: the tokeniser is a slow one."""
    import transformers

    loaded: Any = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    if not getattr(loaded, "is_fast", False):
        return None
    return _tokenizer_from_json(loaded.backend_tokenizer.to_str())


def fit_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` entries, fitted on `texts`; cached on disk.

    Raises:
        ParameterError: the texts hold too few pairs for `vocab_size` entries.
    """
    key = cache.digest(cache.code_fingerprint("data"), tokenizers.__version__, vocab_size, texts)
    path = cache.home() / "tokenizers" / f"{key}.json"
    if not path.exists():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() < vocab_size:
            accepted = f"at most {backend.get_vocab_size()} with these fitting samples"
            raise ParameterError("vocab_size", vocab_size, accepted)
        with cache.whole(path) as temporary:
            backend.save(str(temporary))
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))


def _encode(tokenizer: Tokenizer, texts: list[str], dataset: str, role: str) -> Stream:
    def make() -> dict[str, Tensor]:
        stream = tokenizer.encode(texts)
        return {"tokens": stream.tokens.to(torch.int32), "starts": stream.starts}

    key = cache.digest(cache.code_fingerprint("data"), tokenizer.fingerprint, texts)
    kept = cache.tensors("tokens", key, make)
    stream = Stream(kept["tokens"].long(), kept["starts"])
    ends = torch.cat([stream.starts[1:], torch.tensor([len(stream)])])
    short = torch.nonzero(ends - stream.starts < 2)
    if len(short) and texts:
        number = int(short[0])
        accepted = (
            f"samples of at least 2 tokens (sample {number} for {role} is {texts[number][:40]!r})"
        )
        raise ParameterError("dataset", dataset, accepted)
    return stream


def _split_tail(stream: Stream) -> tuple[Stream, Stream]:
    """The last 10 % of the tokens as validation (the protocol of notes 000-002)."""
    cut = len(stream) - len(stream) // 10
    inside = stream.starts[stream.starts > cut] - cut
    tail_starts = torch.cat([torch.zeros(1, dtype=torch.int64), inside])
    train = Stream(stream.tokens[:cut], stream.starts[stream.starts < cut])
    return train, Stream(stream.tokens[cut:], tail_starts)

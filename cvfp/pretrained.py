"""A trained model as a folder that others can load: with `load`, or with transformers' classes."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers.models.rwkv.modeling_rwkv import RwkvCausalLMOutput as Output

from cvfp import baselines, cache, hub, registry
from cvfp.build import build_cvfp
from cvfp.config import Experiment, ParameterError, resolve_device
from cvfp.model import CVFP
from cvfp.result import Result
from cvfp.tokenizer import Tokenizer

HERE, SAVED = Path(__file__).parent, "a folder that save_pretrained wrote, undamaged"
FILES = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"


class CVFPConfig(transformers.PretrainedConfig):
    """Fields of the Experiment, those left out at their defaults, and the table's shape."""

    model_type = "cvfp"
    experiment: dict[str, Any] | None = None
    vocab_size: int = 4096
    hidden_size: int = 128


class CVFPForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A CVFP (`.cvfp`) as one of transformers' language models; NaN until weights are loaded."""

    config_class = CVFPConfig
    _is_stateful = True
    _supports_default_dynamic_cache = classmethod(lambda cls: False)

    def __init__(self, config: CVFPConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # an own block may not know "meta"
            table = torch.full((config.vocab_size, config.hidden_size), torch.nan)
            self.cvfp = build_cvfp(Experiment(**config.experiment or {}), table)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Onto one device. Raises `ParameterError`: weights are missing, or another model's."""
        wanted, device = kwargs.pop("output_loading_info", False), kwargs.pop("device_map", None)
        device = device.get("", device) if isinstance(device, dict) else device
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if wrong := [key for keys in info.values() for key in keys]:
            raise ParameterError("folder", str(name), f"{SAVED} ({wrong[0]})")
        # A fresh one, for what no file holds: which weights are frozen, an own block's buffers.
        loose, model.cvfp = model.cvfp, cls(model.config).cvfp.to(model.dtype)
        model.cvfp.load_state_dict(loose.state_dict(), assign=True)
        model.to(resolve_device(device) if device == "auto" else device)
        return loaded if wanted else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: list[Tensor] | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        return_dict: bool | None = True,
    ) -> Any:
        """Tokens [B, T] -> logits of the last `logits_to_keep` (0: all), and the state, all that a
        text leaves behind: its context [B, D] and its last n tokens. Padding, on either side, moves
        nothing. Raises `ParameterError`: another shape, an unknown token, a text without any."""
        model, vocab, shape = self.cvfp, self.config.vocab_size, [*input_ids.shape]
        if len(shape) != 2 or input_ids.is_floating_point() or not input_ids.numel():
            raise ParameterError("input_ids", input_ids, "integers [B, T], at least one token")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask[..., -shape[1] :].bool()
        if [*mask.shape] != shape:
            raise ParameterError("attention_mask", attention_mask, f"{shape}, or with those before")
        live = mask & (input_ids != vocab)  # which is what the tokeniser pads with
        if len(wrong := input_ids[live & ((input_ids < 0) | (input_ids > vocab))]):
            raise ParameterError("input_ids", int(wrong[0]), f"0 to {vocab - 1}")
        if state is None and not live.any(dim=1).all():
            raise ParameterError("input_ids", "a text without tokens", "at least one in each")
        context = model.embedding.new_zeros(shape[0], model.context_block.context_dim)
        window = input_ids.new_full((shape[0], model.num_input_tokens), vocab)
        context, window = state or [context, window]
        outputs, steps = list[Tensor](), list[list[Tensor]]()
        table = model.embedding if model.context_table is None else model.context_table
        for there, token in zip(live.T[..., None], input_ids.T[..., None], strict=True):
            window = torch.where(there, torch.cat([window[:, 1:], token], dim=1), window)
            new = model.context_block(context, _embedded(table, window))
            context = torch.where(there, new[-1], context)
            outputs = [torch.where(there, *two) for two in zip(new, outputs or new, strict=True)]
            steps.append([*outputs, _embedded(model.embedding, window)])
        *layers, e = (torch.stack(one, 1) for one in zip(*steps[-logits_to_keep:], strict=True))
        logits = model.logits(model.token_block(layers, e))
        made = Output(logits=logits, state=None if use_cache is False else [context, window])
        return made.to_tuple() if return_dict is False else made

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, state: list[Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # Without what transformers' versions add of their own, but not without what a caller asks.
        own = inspect.signature(self.forward).parameters
        kwargs = {k: x for k, x in kwargs.items() if k in own or k.startswith("output_")}
        return {**kwargs, "input_ids": input_ids[:, -1:] if state else input_ids, "state": state}

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        if (
            int(transformers.__version__.partition(".")[0]) < 5
        ):  # which would leave states behind when beams change
            kwargs["use_cache"] = False
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]

    def _reorder_cache(self, state: list[Tensor], beam_idx: Tensor) -> list[Tensor]:
        return [one[beam_idx] for one in state]


def _embedded(table: Tensor, window: Tensor) -> Tensor:
    """`TokenInputs.embed`, for few rows of a large table."""
    e = F.layer_norm(F.embedding(window.clamp(0, len(table) - 1), table), table.shape[-1:])
    return (e * (window < len(table))[..., None]).flatten(-2)


def save_pretrained(result: Result, folder: str | Path) -> Path:
    """Write a run's model with its tokeniser and a model card into `folder`, all or nothing. Raises
    `ParameterError`: a peer, a control without contexts of its own, a run without a Phase 2, a
    folder that holds something else; FileNotFoundError: as `Result.model`."""
    one, path = result.experiment, Path(folder).expanduser().absolute()
    if one.model != "cvfp":
        raise ParameterError("model", one.model, "'cvfp'")
    if one.contexts not in (kinds := ("trained", "random", *registry.JOINTLY)):
        raise ParameterError("contexts", one.contexts, " or ".join(map(repr, kinds)))
    if result.val_ppl is None:
        raise ParameterError("result", result.aborted or "a stopped run", "one with a Phase 2")
    model: Any = result.model()
    backend = Tokenizer.from_json(model.tokenizer.backend.to_str()).backend
    backend.post_processor = None  # which may add tokens
    words: Any = dict(pad_token="<|pad|>", padding_side="left", clean_up_tokenization_spaces=False)
    words |= dict(model_input_names=["input_ids", "attention_mask"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **words)
    fields = one.to_dict("context", "phase1", "phase2", "run")
    for name in ("objective", "phase1_min_iterations"):  # need not be there; may be over the most
        del fields[name]
    vocab, width = model.embedding.shape
    made = CVFPForCausalLM(CVFPConfig(experiment=fields, vocab_size=vocab, hidden_size=width))
    made.cvfp.load_state_dict(model.state_dict())
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        there = {file.name for file in path.iterdir()} if path.exists() else set()
        if there and not {"digest"} <= there <= {*FILES.split(), "README.md", "digest"}:
            raise OSError("it holds something else")
        with cache.whole(path) as new:
            made.save_pretrained(new)
            shutil.copymode(new / "config.json", new / "model.safetensors")  # the umask's, not 0600
            tokenizer.save_pretrained(new)
            # What transformers 4 tells twice.
            (new / "special_tokens_map.json").unlink(missing_ok=True)
            (new / "tokenizer.json").write_text(backend.to_str(), "utf-8")  # without the padding
            (new / "digest").write_text(_digest(new))
            (new / "README.md").write_text(_card(result), "utf-8")
            if there:
                path.replace(new.with_name("before"))
    except (OSError, SafetensorError) as error:
        accepted = f"a new or empty folder, or one saved before ({error})"
        raise ParameterError("folder", str(folder), accepted) from error
    return path


def load(folder: str | Path) -> CVFP:
    """The model that `save_pretrained` wrote, with its tokeniser, on the CPU. Raises
    `ParameterError`: a folder that is damaged or another's, a block that is not registered."""
    path = Path(folder).expanduser()
    try:  # there is no digest where transformers has saved the model again
        if (path / "digest").exists() and (path / "digest").read_text() != _digest(path):
            raise ValueError("files are not as they were saved")
        model: CVFP = CVFPForCausalLM.from_pretrained(path, local_files_only=True).cvfp
        model.tokenizer = Tokenizer.from_json((path / "tokenizer.json").read_text("utf-8"))
    except ParameterError:
        raise
    except Exception as error:  # tokenizers has no class of its own
        raise ParameterError("folder", str(folder), f"{SAVED} ({error})") from error
    return model


def _digest(path: Path) -> str:
    return cache.digest(*((path / name).read_bytes() for name in FILES.split()))


def _card(result: Result) -> str:
    """The model card: what the run measured, and the ledger's verdicts in its setting."""
    row = {k: "–" if x is None else x for k, x in result.row().items()}
    row |= {k: f"{x:,.4g}" for k, x in row.items() if isinstance(x, float)}
    corpus = {name: row[name] for name in ("dataset", "tokenizer", "embedding")}
    presets = {k: Experiment.preset(k).to_dict().items() for k in ("mini", "published_size")}
    other = "ultrachat" if "ultrachat" in corpus["dataset"].lower() else "other"
    setting = next((k for k, x in presets.items() if corpus.items() <= x), other)
    path = HERE.parent / "reports" / "claims.json"  # in a checkout
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    said = [f"- {x['id']}.{x['part']}: {x['direction']}" for x in rows if x["setting"] == setting]
    for name, x in corpus.items():  # a path is nobody's business, marks are no Markdown
        row[name] = re.sub(r"[^\w./ -]+", " ", x if hub.local(x) is None else Path(x).name)
    row |= dict(setting=setting, ledger="\n".join(said) or "Nothing.", names=baselines.NAMES)
    return (HERE / "card.md").read_text("utf-8").format(**row)


transformers.AutoConfig.register("cvfp", CVFPConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(CVFPConfig, CVFPForCausalLM, exist_ok=True)

"""The untrained model of an Experiment."""

from __future__ import annotations

import torch
from torch import Tensor

from cvfp import controls, end_to_end, registry, seeds
from cvfp import variants as variants  # registers its parts
from cvfp.config import Experiment
from cvfp.controls import count_parameters
from cvfp.end_to_end import Peer
from cvfp.model import CVFP, ContextBlock, initialise
from cvfp.tokenizer import Tokenizer


def build(experiment: Experiment, table: Tensor, tokenizer: Tokenizer) -> CVFP | Peer:
    """The untrained model of an Experiment over `table` [V, E]. Raises `ParameterError`: a peer
    that cannot be matched to CVFP's size."""
    if experiment.model != "cvfp":
        size = cvfp_size(experiment, table.shape[1])
        seed = seeds.generator(experiment.seed, "peer").initial_seed()
        return end_to_end.peer(experiment, table, size, seed)
    # On the device from the start: table and head are large.
    return build_cvfp(experiment, table.to(experiment.device), tokenizer)


def build_cvfp(experiment: Experiment, table: Tensor, tokenizer: Tokenizer | None = None) -> CVFP:
    """The untrained CVFP of an Experiment over `table` [V, E], on the table's device."""
    with table.device:
        model = _blank(experiment, table, tokenizer)
    model.context_block.initialise(seeds.generator(experiment.seed, "context_block"))
    token_block = seeds.generator(experiment.seed, "token_block")
    initialise(model.token_block, token_block, experiment.token_block_std)
    if experiment.contexts == "window":
        controls.level_window(model, experiment.context_dim)
    return model


def cvfp_size(experiment: Experiment, embedding_dim: int) -> int:
    """Parameters of the Experiment's ContextBlock and TokenBlock: what a peer is matched to."""
    with torch.device("meta"):
        model = _blank(experiment, torch.empty(1, embedding_dim))
    return count_parameters(model.context_block) + count_parameters(model.token_block)


def _blank(experiment: Experiment, table: Tensor, tokenizer: Tokenizer | None = None) -> CVFP:
    """A CVFP whose blocks are not initialised yet."""
    input_dim = experiment.num_input_tokens * table.shape[1]
    part, width = registry.resolve("block", experiment.block), experiment.context_dim
    if not registry.is_built_in(part):
        with torch.device("cpu"):
            tried = part(experiment, input_dim)
            registry.check_block(experiment.block, tried, width, input_dim)
    model = CVFP(
        table,
        part(experiment, input_dim),
        num_input_tokens=experiment.num_input_tokens,
        weight_tying=experiment.weight_tying,
        freeze_embedding=experiment.freeze_embedding,
        tokenizer=tokenizer,
        context_widths=controls.context_widths(experiment, table.shape[1]),
        generates=experiment.contexts in ("trained", "random", *registry.JOINTLY),
    )
    if experiment.contexts in registry.JOINTLY:
        model.context_table = None  # no Phase 1 that the table would have to stay as it was for
    return model


@registry.block("published")
def published(experiment: Experiment, input_dim: int) -> ContextBlock:
    """The ContextBlock of the notes."""
    stds, every = (experiment.context_std, experiment.input_std), experiment.token_input_all_layers
    return ContextBlock(experiment.num_layers, experiment.context_dim, input_dim, every, *stds)

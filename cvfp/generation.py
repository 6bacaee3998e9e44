"""Text from a trained model, one token after the other."""

from __future__ import annotations

import torch

from cvfp.model import CVFP


@torch.no_grad()
def generate(
    model: CVFP, prompt: str, max_new_tokens: int = 50, temperature: float = 1.0, seed: int = 0
) -> str:
    """`prompt` and its continuation; the state is one context vector and n tokens.

    `temperature` divides the logits before sampling; 0: always the likeliest token. Raises
    ValueError: no tokeniser, a prompt without tokens, or a number out of range."""
    if not model.generates:
        raise ValueError("contexts: got a control without any; accepted: a model that has them")
    if model.tokenizer is None:
        raise ValueError("tokenizer: got None; accepted: a model built with a tokeniser")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; accepted: at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}; accepted: 0 or more")
    tokens = model.tokenizer.encode([prompt]).tokens.to(model.embedding.device)
    if not len(tokens):
        raise ValueError("prompt: got no tokens; accepted: text of at least one token")
    generator = torch.Generator().manual_seed(seed)
    window = tokens.new_full((model.num_input_tokens,), len(model.embedding))  # "no token"
    context_inputs, inputs = model.context_inputs(tokens), model.token_inputs(tokens)
    context = model.embedding.new_zeros(1, model.context_block.context_dim)
    for position in range(len(tokens) + max_new_tokens - 1):
        window = torch.cat([window[1:], tokens[position : position + 1]])
        outputs = model.context_block(context, context_inputs.embed(window[None]))
        context = outputs[-1]
        if position + 1 < len(tokens):
            continue
        hidden = model.token_block(outputs, inputs.embed(window[None]))
        logits = model.logits(hidden)[0].float().cpu()
        if temperature == 0:
            following = logits.argmax()[None]
        else:
            weights = torch.softmax(logits / temperature, dim=-1)
            following = torch.multinomial(weights, 1, generator=generator)
        tokens = torch.cat([tokens, following.to(tokens)])
    return model.tokenizer.decode(tokens.tolist())

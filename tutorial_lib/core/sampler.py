# Exported from chapters/part_2_training_a_tiny_llm/2_5_sampling.ipynb. Edit the lesson, then run: make export
"""Choosing the next token: reshape the distribution, then draw from it.

Each filter takes logits `(..., V)` and returns logits; -inf means "never". They compose by being called
one after the other, always in the order of `sample`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["apply_temperature", "top_k_filter", "top_p_filter", "repetition_penalty", "sample", "generate"]


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature: below 1 sharpens, above 1 flattens, order never changes."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0 (sample() reads 0 as greedy)")
    return logits / temperature


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens (more where several tie for the last place)."""
    if k < 1:
        raise ValueError(f"top_k is {k}, but at least one token must stay")
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < least, float("-inf"))


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities reach p (Holtzman et al. 2020).

    A token stays while the probability *before* it is below p, so the first always stays.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p is {p}, but is a probability: above 0, at most 1")
    if p == 1:  # rounding lets the running sum reach 1 before the last tokens
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= p)  # back in place
    return logits.masked_fill(drop, float("-inf"))


def repetition_penalty(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Push down every token that was already written (after Keskar et al. 2019, CTRL, section 4.1).

    Positive logits are divided by the penalty and negative ones multiplied: both go down. (The paper
    divides them all, which raises the negative ones.) However often a token was written, it is
    penalized once.

    Args:
        logits: `(B, V)`.
        previous: Ids already written, `(B, T)`.
        penalty: 1 changes nothing; 1.1 to 1.3 is usual.
    """
    if penalty <= 0:
        raise ValueError(f"repetition penalty is {penalty}, but must be above 0 (1 changes nothing)")
    seen = logits.gather(-1, previous)
    return logits.scatter(-1, previous, torch.where(seen > 0, seen / penalty, seen * penalty))


def sample(
    logits: Tensor,
    previous: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row: penalty, temperature, top-k, top-p, then a draw.

    Args:
        logits: `(B, V)`.
        previous: Ids already written `(B, T)`, for the penalty.
        temperature: 0 takes the most likely token.
        generator: Makes the draw repeatable, and leaves the global one alone.

    Returns:
        Ids `(B,)`.
    """
    if penalty != 1.0 and previous is not None:
        logits = repetition_penalty(logits, previous, penalty)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = apply_temperature(logits.float(), temperature)
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    ids: Tensor,
    max_new_tokens: int,
    max_seq_len: int | None = None,
    eos_id: int | None = None,
    **how: object,
) -> Iterator[Tensor]:
    """Write on from `ids` `(B, T)`, one token `(B,)` at a time; `how` goes to `sample`.

    The model sees at most the last `max_seq_len` tokens (its config's when None). Stops early when every
    row has written `eos_id`; a row that has finished repeats it.

    Raises:
        ValueError: at the first token, if `ids` is empty or `how` asks for something impossible.
    """
    if ids.shape[1] == 0:
        raise ValueError("nothing to write on from: give at least one token")
    if max_seq_len is None:
        max_seq_len = model.config.max_seq_len
    was_training = getattr(model, "training", False)
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    try:
        for _ in range(max_new_tokens):
            if was_training:
                model.eval()
            logits = model(ids[:, -max_seq_len:])[:, -1]  # (B, V)
            if was_training:
                model.train()
            token = sample(logits, ids, **how)  # (B,)
            if eos_id is not None:
                token = torch.where(finished, eos_id, token)
                finished |= token == eos_id
            yield token
            if finished.all():
                return
            ids = torch.cat([ids, token[:, None]], dim=1)
    finally:
        if was_training:
            model.train()

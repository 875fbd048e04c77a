# Exported from chapters/part_3_modernizing/3_4_kv_cache.ipynb. Edit the lesson, then run: make export
"""Writing with a cache: read the prompt once (prefill), then one token at a time (decode)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.core.sampler import sample

__all__ = ["left_pad", "generate_cached"]


def left_pad(prompts: list[list[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch that ends together, so that all rows continue at once.

    Returns:
        Ids `(B, T)`, padded at the left, and positions `(B, T)`: 0, 1, 2, … for each prompt, -1 for padding.

    Raises:
        ValueError: if a prompt is empty.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: give at least one token")
    T = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (T - len(prompt)) + prompt for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    positions = torch.arange(T) - (T - lengths)[:, None]  # (B, T)
    return ids, positions.clamp(min=-1)


@torch.no_grad()
def generate_cached(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    positions: Tensor | None = None,
    cache: list[Any] | None = None,
    chunk: int | None = None,
    eos_id: int | None = None,
    **how: Any,
) -> Iterator[Tensor]:
    """Write on from `ids` `(B, T)`, one token `(B,)` at a time; `how` goes to `sample`.

    It gives the same tokens as `generate`, which recomputes the past for each, as long as all fits in
    `max_seq_len`.

    Args:
        model: A model with `hidden`, `logits` and `new_cache` (`Transformer`).
        ids: The prompt; with a `cache` that already holds a conversation, what is new in it.
        max_new_tokens: How many to write.
        positions: Where the tokens stand, `(B, T)` from `left_pad`, when prompts differ in length.
        cache: From `model.new_cache`; one that is just large enough when None. The last token written is not
            in it yet: to go on later, begin the next `ids` with that token.
        chunk: Read the prompt in pieces of this many tokens, which bounds the memory; whole when None.
        eos_id: Stop when every row has written it; a row that has finished repeats it.

    Raises:
        ValueError: at the first token, if `ids` is empty or `how` or `chunk` asks for something impossible.
    """
    B, T = ids.shape
    if T == 0:
        raise ValueError("nothing to write on from: give at least one token")
    chunk = T if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but a piece has at least one token")
    was_training = model.training
    model.eval()
    finished = torch.zeros(B, dtype=torch.bool, device=ids.device)
    if cache is None:
        cache = model.new_cache(B, T + max_new_tokens)
    try:
        for start in range(0, T, chunk):
            piece = slice(start, start + chunk)
            hidden = model.hidden(ids[:, piece], None if positions is None else positions[:, piece], cache)
        # Padding was never written, so the repetition penalty must not see it: the last token takes its place.
        written = ids if positions is None else ids.where(positions >= 0, ids[:, -1:])
        for left in reversed(range(max_new_tokens)):
            token = sample(model.logits(hidden[:, -1]), written, **how)  # (B,); only the last one speaks
            if eos_id is not None:
                token = torch.where(finished, eos_id, token)
                finished |= token == eos_id
            yield token
            if not left or finished.all():
                return
            written = torch.cat([written, token[:, None]], dim=1)
            hidden = model.hidden(token[:, None], cache=cache)  # one token: the rest is in the cache
    finally:
        model.train(was_training)

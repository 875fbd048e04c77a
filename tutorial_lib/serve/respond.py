"""Answering requests: many at once, each with its own length, temperature, seed and stops, token by token.

    replies = complete(model, tokenizer, [Request(ids, temperature=0.7, seed=1), Request(other, stop=("\\n\\n",))])

A request with a seed is answered the same whoever else is in the batch, up to rounding.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tutorial_lib.core.decoding import left_pad
from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.model import Transformer
from tutorial_lib.core.sampler import sample
from tutorial_lib.data.protocol import Tokenizer, token_bytes

__all__ = ["Reply", "Request", "complete", "respond"]

CHUNK = 512
"""Tokens of a prompt that are read at once: it bounds the memory for their scores."""


@dataclass(frozen=True)
class Request:
    """What to write on from, and how."""

    ids: Sequence[int]
    """The prompt."""
    max_new_tokens: int = 200
    """How many tokens to write at most."""
    temperature: float = 0.8
    """0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from so many of the likeliest."""
    top_p: float | None = None
    """Draw from the likeliest that together reach this probability."""
    penalty: float = 1.0
    """Repetition penalty; 1 is none."""
    seed: int | None = None
    """The same seed writes the same text; None: another one every time."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer; they are not part of its text."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it, either."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("the prompt is empty: give at least one token")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be 0 or more")
        if not 0 <= self.temperature < math.inf:  # NaN is not, either
            raise ValueError(f"temperature is {self.temperature}, but must be a number, 0 or more")
        if 0 < self.temperature < 1e-4:  # scores divided by less are not finite
            raise ValueError(f"temperature is {self.temperature}: say 0 for always the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but at least one token must stay")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but is a probability: above 0, at most 1")
        if not 0 < self.penalty < math.inf:
            raise ValueError(
                f"the repetition penalty is {self.penalty}, but must be a number above 0 (1 is none)"
            )
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}, but must fit into 64 bits")
        if isinstance(self.stop, str):
            raise ValueError(
                f"stop is the text {self.stop!r}, but must be a tuple of texts: ({self.stop!r},)"
            )
        if "" in self.stop:
            raise ValueError("a stop text is empty, which would be found at once")


@dataclass
class Reply:
    """An answer, as far as it is written."""

    ids: list[int] = field(default_factory=list)
    """All tokens that were drawn, a stop token among them."""
    text: str = ""
    """What they say."""
    end: str | None = None
    """Why it ended: `token` (one of `stop_ids`), `text` (one of `stop`) or `length`; None while it is written."""


class _Writer:
    """Turns a request's tokens into text that is certain: no half characters, and nothing of a stop text."""

    def __init__(self, request: Request, tokenizer: Tokenizer, device: torch.device) -> None:
        self.request, self.tokenizer, self.reply = request, tokenizer, Reply()
        self.generator = torch.Generator(device)
        self.generator.seed() if request.seed is None else self.generator.manual_seed(request.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # may be the beginning of a stop text
        if request.max_new_tokens == 0:
            self.reply.end = "length"

    def choose(self, scores: Tensor, written: Tensor | None) -> int:
        """The next token, from its scores `(1, V)`."""
        request = self.request
        how = (request.temperature, request.top_k, request.top_p, request.penalty, self.generator)
        return int(sample(scores, written, *how))

    def take(self, token: int) -> str:
        """The text that has become certain with this token."""
        reply, request = self.reply, self.request
        reply.ids.append(token)
        stopped, full = token in request.stop_ids, len(reply.ids) == request.max_new_tokens
        try:
            new = b"" if stopped else token_bytes(self.tokenizer, token)
        except ValueError:  # a vocabulary can have gaps, and a model a row for each
            new = b""
        self.held += self.decoder.decode(new, final=stopped or full)
        if found := [at for stop in request.stop if (at := self.held.find(stop)) >= 0]:
            self.held = self.held[: min(found)]
            reply.end = "text"
        elif stopped or full:
            reply.end = "token" if stopped else "length"
        certain = len(self.held) - (self._doubtful() if reply.end is None else 0)
        piece, self.held = self.held[:certain], self.held[certain:]
        reply.text += piece
        return piece

    def _doubtful(self) -> int:
        """How many characters at the end could be the beginning of a stop text."""
        starts = (stop[:n] for stop in self.request.stop for n in range(1, len(stop)))
        return max((len(start) for start in starts if self.held.endswith(start)), default=0)


@torch.inference_mode()
def respond(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    cache: list[KVCache] | None = None,
) -> Generator[tuple[int, str], None, list[Reply]]:
    """Answer all requests at once: gives pieces of text as they become certain, each with its request's number.

    Args:
        model: A `Transformer`. Another model that takes ids and gives logits, or a text that has become longer than
            the model was trained on, is read anew for each token, through a window that moves along.
        cache: Of a conversation, for one request: as many of the request's first tokens as it holds are not read
            again. At the end it holds the prompt and the answer, but for the last token.

    Returns:
        (As generators do, with `yield from`; `complete` simply hands it out.) The replies.

    Raises:
        ValueError: if a request asks for something impossible.
    """
    device = next(model.parameters()).device
    writers = [_Writer(request, tokenizer, device) for request in requests]
    known = tokenizer.vocab_size  # a model may have more rows than its tokenizer has tokens
    texts = [list(request.ids) for request in requests]
    rows = model.config.vocab_size
    for i in chain(*texts):
        if not 0 <= i < rows:
            raise ValueError(f"the prompt has the id {i}, but the model knows those from 0 to {rows - 1:,}")
    most = max((request.max_new_tokens for request in requests), default=0)
    reads = model.config.max_seq_len
    steps = _moving_window(model, texts)
    if isinstance(model, Transformer) and (cache is not None or max(map(len, texts), default=0) <= reads):
        room = most
        if cache is None:
            # When the first context is full, the window moves; a table of positions ends for all.
            ends = model.positions is not None
            full = [reads - len(r.ids) for r in requests if ends or len(r.ids) + r.max_new_tokens > reads]
            room = min([most, *full])
        steps = chain(_cached(model, texts, room, cache), steps)
    was_training = model.training
    try:
        model.eval()
        scores = next(steps) if most else None
        while any(writer.reply.end is None for writer in writers):
            assert scores is not None
            for row, writer in enumerate(writers):
                if writer.reply.end is not None:
                    texts[row].append(texts[row][-1])  # anything: nobody will read it
                    continue
                written = torch.tensor([texts[row]], device=device) if writer.request.penalty != 1 else None
                token = writer.choose(scores[row : row + 1, :known], written)
                texts[row].append(token)
                if piece := writer.take(token):
                    yield row, piece
            if any(writer.reply.end is None for writer in writers):
                scores = next(steps)
    finally:
        model.train(was_training)
    return [writer.reply for writer in writers]


def _cached(
    model: Transformer, texts: list[list[int]], room: int, cache: list[KVCache] | None
) -> Iterator[Tensor]:
    """Scores for the next token `(B, V)`, while there is room; in between, every text has got one token more."""
    device = model.norm.weight.device
    ids, positions = left_pad(texts)
    ids, positions = ids.to(device), positions.to(device)
    if cache is None:
        cache = model.new_cache(len(texts), ids.shape[1] + room)
    if cache[0].length >= ids.shape[1]:
        raise ValueError("the cache holds the whole prompt already: there has to be a token that it does not")
    ids, positions = ids[:, cache[0].length :], positions[:, cache[0].length :]
    padded = len(set(map(len, texts))) > 1  # if nothing is, the kernel needs no mask
    for start in range(0, ids.shape[1], CHUNK):
        piece = slice(start, start + CHUNK)
        hidden = _read(model, ids[:, piece], positions[:, piece] if padded else None, cache)
    yield model.logits(hidden[:, -1])
    for _ in range(room):
        hidden = _read(model, torch.tensor([text[-1:] for text in texts], device=device), None, cache)
        yield model.logits(hidden[:, -1])


def _read(model: Transformer, ids: Tensor, positions: Tensor | None, cache: list[KVCache]) -> Tensor:
    # cuDNN's kernel makes a plan for every new length, and writing has a new length with every token: on an H200,
    # 32 texts in bf16 were written 3 to 4 times as fast without it.
    if ids.device.type != "cuda":
        return model.hidden(ids, positions, cache)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return model.hidden(ids, positions, cache)


def _moving_window(model: nn.Module, texts: list[list[int]]) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    while True:
        windows = [torch.tensor([text[-model.config.max_seq_len :]], device=device) for text in texts]
        yield torch.cat([model(ids)[:, -1] for ids in windows])


def complete(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[Request], cache: list[KVCache] | None = None
) -> list[Reply]:
    """All answers, when they are finished."""
    steps = respond(model, tokenizer, requests, cache)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value

"""Supervised fine-tuning: conversations, a model, and what the assistant says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from tutorial_lib.data.adapters import HuggingFaceTokenizer, as_huggingface
from tutorial_lib.data.conversations import PROBLEMS, Conversation, load_conversations
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.data.splits import split_by_hash
from tutorial_lib.eval.held_out import held_out
from tutorial_lib.interop.checkpoint import model_header
from tutorial_lib.interop.tokenizers import load_tokenizer
from tutorial_lib.runs.config import Config, ConfigError
from tutorial_lib.runs.inputs import pretrained
from tutorial_lib.runs.parts import described, make_trainer, pick_precision, rows_at_once, with_balance
from tutorial_lib.runs.run import Outcome, Start, Work, carry_out
from tutorial_lib.runs.settings import DataTable, new_model
from tutorial_lib.serve.template import ChatTemplate, TemplateProblem
from tutorial_lib.sft.batches import PackedRows, PaddedRows
from tutorial_lib.sft.chat_format import CHAT, grow_vocabulary, with_roles
from tutorial_lib.sft.examples import Example, cut_to, encode_example
from tutorial_lib.sft.objective import Answers
from tutorial_lib.tools.expect import expect
from tutorial_lib.tools.seeds import derive_seed
from tutorial_lib.train.distributed import rank, world_size

__all__ = ["SFTConfig", "SFTTable", "fine_tune"]


@dataclass
class SFTData(DataTable):
    """What to learn from."""

    dataset: str = PROBLEMS
    """`problems`, the course's own world, or a pattern of files of JSON lines: `messages`, or `prompt` and `completion`."""
    val: str | None = None
    """Another such data set to validate on. None: `val_fraction` of the conversations, chosen by their first question."""


@dataclass
class SFTTable:
    """How to learn from conversations."""

    pack: bool = True
    """Whether several conversations share a row of `train.seq_len`, each seeing itself alone; else each is filled up."""
    n_problems: int = 50_000
    """How many problems are drawn to learn from, if `data.dataset` is `problems`; of a tenth as many the loss is measured."""


@dataclass
class SFTConfig(Config):
    """A run that fine-tunes."""

    data: SFTData = field(default_factory=SFTData)
    sft: SFTTable = field(default_factory=SFTTable)


@dataclass
class Speaker:
    """A model with the way it writes a conversation down."""

    model: nn.Module
    tokenizer: Tokenizer
    template: ChatTemplate

    def keep(self, folder: Path) -> None:
        """Put tokenizer and template beside the checkpoints: `chat` and `export` find them there."""
        as_huggingface(self.tokenizer).save(folder / "tokenizer.json", self.template.source)

    def ask(self, question: str) -> list[int]:
        """A question in ids, with what announces the answer."""
        return self.template.encode(self.tokenizer, [{"role": "user", "content": question}])


class Learned:
    """Examples in rows, and a name for what they are: a run goes on with those that it began with."""

    def __init__(self, examples: Sequence[Example], pack: bool, seq_len: int, what: str) -> None:
        if not examples:
            raise ConfigError(f"data: there is no conversation to {what}")
        self.examples, self.what = examples, what
        digest = hashlib.sha256()
        for example in examples:
            digest.update(json.dumps([example.ids, example.learned]).encode())
        self.digest = digest.hexdigest()
        self.rows = PackedRows(examples, seq_len) if pack else PaddedRows(examples)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, ...]]:
        """All of them once, in order."""
        n = len(self.rows)
        return (self.rows.batch(range(start, min(start + rows, n))) for start in range(0, n, rows))

    def state_dict(self) -> dict[str, Any]:
        """Which examples these are."""
        return {"examples": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A ValueError if the run began with others."""
        expect(state, {"examples": str}, f"callbacks.{self.what}")
        if state != self.state_dict():
            raise ValueError(
                f"the conversations to {self.what} are not those that the run began with: have they changed?"
            )


def fine_tune(config: SFTConfig, resume: bool = False, console: Console | None = None) -> Outcome:
    """Teach a model to answer, as `carry_out` says, which also raises."""
    return carry_out(config, _prepare, resume, console)


def _prepare(config: SFTConfig, start: Start) -> Work:
    train = config.train
    speaker = _speaker(config, start)
    learn, measure = _conversations(config)
    start.tell(f"{len(learn) + len(measure):,} conversations are written down as the model reads them")
    examples = [
        _encode(speaker, conversations, train.seq_len, what, start.tell)
        for conversations, what in ((learn, "learn from"), (measure, "validate on"))
    ]
    to_learn, to_measure = (
        Learned(found, config.sft.pack, train.seq_len, what)
        for found, what in zip(examples, ("learn from", "validate on"), strict=True)
    )
    rows, precision = rows_at_once(train), pick_precision(train.amp, start.device)
    looks = ceil(min(train.eval_windows or len(to_measure.rows), len(to_measure.rows)) / rows)
    model = speaker.model.train().to(start.device)
    used = sum(len(example) - 1 for example in to_learn.examples)
    start.tell(
        f"{described(model, start.device, precision)}; {len(to_learn.examples):,} conversations of "
        f"{used / len(to_learn.examples):.0f} tokens in {len(to_learn.rows):,} rows to learn from, "
        f"{len(to_measure.examples):,} to validate on"
    )
    header = model_header(model, {"tokenizer": "tokenizer.json", "run": config.as_dict()})
    seed = derive_seed(train.seed, "data")
    batches = ShuffledBatches(to_learn.rows, train.batch_size, seed, rank(), world_size())
    objective, callbacks = with_balance(model, Answers())
    trainer = make_trainer(config, model, objective, batches)
    return Work(
        trainer,
        header,
        lambda judged: held_out(
            judged, start.through(islice(to_measure.batches(rows), looks), of=looks), trainer.objective
        ),
        speaker.tokenizer,
        keep=speaker.keep,
        callbacks=callbacks,
        also={"learned": to_learn, "validated": to_measure},
        ask=speaker.ask,
    )


def _speaker(config: SFTConfig, start: Start) -> Speaker:
    """The model that `train.init_from` names, or a fresh one; if it was never taught to chat, with the course's format."""
    found = pretrained(config, start.checkpoints)
    torch.manual_seed(config.train.seed)  # the same new rows on every process
    if found is None:
        tokenizer = with_roles(load_tokenizer(config.data.tokenizer or "byte"))
        if config.model.vocab_size < tokenizer.vocab_size:
            config.model.vocab_size = tokenizer.vocab_size
        return Speaker(new_model(config), tokenizer, _template(tokenizer))
    if found.chats:
        return Speaker(found.model, found.tokenizer, found.template)
    if config.data.tokenizer not in (None, found.tokenizer_name):
        raise ConfigError(
            f"data.tokenizer is {config.data.tokenizer}, but train.init_from {config.train.init_from} reads "
            f"{found.tokenizer_name}: leave it out"
        )
    try:
        tokenizer = with_roles(found.tokenizer)
    except ValueError as error:
        raise ConfigError(
            f"train.init_from {config.train.init_from} cannot be taught to chat: {error}"
        ) from None
    model = found.model
    if tokenizer.vocab_size > model.config.vocab_size:
        model = grow_vocabulary(model, tokenizer.vocab_size)
        config.model.vocab_size = tokenizer.vocab_size
    start.tell(
        f"{config.train.init_from} was never taught to chat: it gets the course's template and its tokens"
    )
    return Speaker(model, tokenizer, _template(tokenizer))


def _template(tokenizer: HuggingFaceTokenizer) -> ChatTemplate:
    return ChatTemplate(CHAT, {"bos_token": tokenizer.bos or ""})


def _conversations(config: SFTConfig) -> tuple[list[Conversation], list[Conversation]]:
    """What is learned from, and what is held out; never the same question on both sides."""
    data, n, seed = config.data, config.sft.n_problems, config.train.seed
    try:
        learn = load_conversations(data.dataset, n, "train", seed)
        if data.val is not None or data.dataset == PROBLEMS:
            return learn, load_conversations(data.val or PROBLEMS, max(n // 10, 1), "held_out", seed)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    questions = [next((m["content"] for m in one if m["role"] == "user"), "") for one in learn]
    sides = tuple([learn[i] for i in side] for side in split_by_hash(questions, data.val_fraction))
    for side, what in zip(sides, ("to learn from", "held out"), strict=True):
        if not side:
            raise ConfigError(
                f"data: of {len(learn)} conversations in {data.dataset}, none is {what} with "
                f"data.val_fraction={data.val_fraction}: name another file in data.val"
            )
    return sides


def _encode(
    speaker: Speaker,
    conversations: Sequence[Conversation],
    seq_len: int,
    what: str,
    tell: Callable[[str], None],
) -> list[Example]:
    """In ids; those that are too long without their beginning, and it is said how many there are."""
    found, too_long, empty = [], 0, 0
    for at, conversation in enumerate(conversations):
        try:
            example = encode_example(speaker.template, speaker.tokenizer, conversation)
        except TemplateProblem as error:
            raise ConfigError(f"data: conversation {at + 1} to {what}: {error}") from None
        too_long += len(example) > seq_len + 1
        example = cut_to(example, seq_len + 1)
        if example.n_learned:
            found.append(example)
        else:
            empty += 1
    if too_long:
        tell(
            f"warning: {too_long:,} of {len(conversations):,} conversations to {what} have more than train.seq_len="
            f"{seq_len} tokens: their beginning is cut off"
        )
    if empty:
        tell(f"warning: {empty:,} conversations to {what} have nothing that is learned: they are left out")
    return found

"""What happens between steps: evaluate, sample, save.

Each is called with `StepInfo` after every step, and may ask for the end by returning True. All processes call all
of them (under FSDP a forward pass needs everybody); files are written by the first process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from tutorial_lib.core.sampler import generate
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.tools.expect import Maybe, expect
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.distributed import barrier, is_main
from tutorial_lib.train.loggers import Logger
from tutorial_lib.train.loop import StepInfo
from tutorial_lib.train.losses import bits_per_byte
from tutorial_lib.train.stopping import EarlyStopping
from tutorial_lib.train.trainer import Trainer

__all__ = [
    "Due", "Evaluate", "HasState", "Look", "Sample", "Save", "Stopped", "every", "judged", "shares", "write_on",
]  # fmt: skip


class Stopped(Exception):
    """The person at the terminal wants the end: raised in the middle of a look, which then found nothing."""


Due: TypeAlias = Callable[[StepInfo], bool]
"""Whether it is time, after this step."""


def every(steps: int) -> Due:
    """Every so many steps, and at the end."""
    return lambda info: info.step % steps == 0 or info.progress >= 1


def shares(parts: int) -> Due:
    """So many times, evenly spread over a run that may be measured in seconds; the last time is the end."""
    done = [0]

    def due(info: StepInfo) -> bool:
        before, done[0] = done[0], int(info.progress * parts + 1e-9)
        return done[0] > before

    return due


Look: TypeAlias = Callable[[nn.Module], Mapping[str, float]]
"""What a model is judged by."""


class Evaluate:
    """Judges the model when it is due; says stop when it no longer gets better, or when a look is broken off.

    Every process looks at the same: under FSDP they have to walk through the model together.

    Args:
        look: Called with the model; gives numbers by name, `loss` among them, the lower the better.
        bytes_per_token: Of the text that it looks at, for bits per byte; None if it is no text.
        patience: Stop after so many looks in a row without a gain; None never does.
    """

    def __init__(
        self,
        trainer: Trainer,
        look: Look,
        due: Due,
        logger: Logger,
        bytes_per_token: float | None = None,
        patience: int | None = None,
    ) -> None:
        self.trainer, self._look, self.due, self.logger = trainer, look, due, logger
        self.bytes_per_token = bytes_per_token
        self.stopping = EarlyStopping(patience or 1)
        self.may_stop = patience is not None
        self.loss: float | None = None
        """What the last look found; None before the first."""
        self.step = -1
        """The step of the last look."""
        self.said_stop = False
        """Whether it was this that ended the run."""
        self.owes = False
        """Whether a look was due and is not finished: a run that goes on begins with it."""
        self.ahead: Callable[[StepInfo], None] = lambda info: None
        """Called before a look, which may take minutes: what was trained is put in a safe place first."""

    def __call__(self, info: StepInfo) -> bool:
        if not self.due(info):
            return False
        self.owes = True
        self.ahead(info)
        return self.look(info.step)

    def look(self, step: int) -> bool:
        """Now; True means stop."""
        self.owes = True
        try:
            with self.trainer.precision.autocast():
                found = self._look(judged(self.trainer))
        except Stopped:
            return True
        self.step, self.loss, self.owes = step, found["loss"], False
        values = {f"val_{name}": value for name, value in found.items()}
        if self.bytes_per_token is not None:
            values["val_bits_per_byte"] = bits_per_byte(self.loss, self.bytes_per_token)
        self.logger.scalars(step, values)
        self.said_stop = self.stopping.update(self.loss) and self.may_stop
        return self.said_stop

    def loss_at(self, step: int) -> float | None:
        """The loss of that step's look, if there was one."""
        return self.loss if self.step == step else None

    def looked(self, info: StepInfo) -> bool:
        """Whether it has just been its turn: when others are due."""
        return self.step == info.step

    def state_dict(self) -> dict[str, Any]:
        """The best so far, how long ago, and whether a look is owed."""
        return {"best": self.stopping.best, "bad": self.stopping.bad, "owes": self.owes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting where an earlier run stopped; a ValueError if this is no such state."""
        expect(state, {"best": float, "bad": int, "owes": Maybe(bool)}, "callbacks.evaluate")
        self.stopping.best, self.stopping.bad = state["best"], state["bad"]
        self.owes = bool(state.get("owes"))


def judged(trainer: Trainer) -> nn.Module:
    """The model that will be used in the end, so the one that is judged: the average of the weights, if there is one."""
    return trainer.model if trainer.ema is None else trainer.ema.module


class Sample:
    """When it is due, writes down how the model continues a prompt: always with the same random numbers.

    Args:
        context: The most tokens that the model looks back at.
        n: How many it writes.
        through: What its tokens go through on their way, as in `Start`.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer,
        prompt: str,
        due: Due,
        logger: Logger,
        context: int | None = None,
        n: int = 120,
        through: Callable[[Iterable[int]], Iterable[int]] = iter,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.trainer, self.tokenizer, self.prompt, self.due = trainer, tokenizer, prompt, due
        self.encode = encode or tokenizer.encode
        self.logger, self.context, self.n, self.through = logger, context, n, through
        self.text = ""
        """The last one."""
        self.step = -1
        """Its step."""

    def __call__(self, info: StepInfo) -> None:
        if self.due(info):
            with suppress(Stopped):
                self.write(info.step)

    def write(self, step: int) -> str:
        """Now."""
        with self.trainer.precision.autocast():
            ids = self.encode(self.prompt)
            self.text = write_on(
                judged(self.trainer), self.tokenizer, ids, self.n, self.context, self.through
            )
        self.step = step
        self.logger.text(step, "sample", self.text)
        return self.text


def write_on(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    n: int = 120,
    context: int | None = None,
    through: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> str:
    """The prompt and the `n` tokens that the model writes after it, from the same random numbers at every call.

    Args:
        prompt: A text to go on with; or the ids of a question, whose answer ends at the tokenizer's end token.
    """
    device = next(model.parameters()).device
    start = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    ids = torch.tensor([start], device=device)
    how = {"temperature": 0.8, "top_p": 0.95, "generator": torch.Generator(device).manual_seed(0)}
    ends = None if isinstance(prompt, str) else tokenizer.eos_id
    new: list[int] = []
    for token in through(generate(model, ids, n, context, **how)):
        new.append(int(token))
        if new[-1] == ends:
            break
    known = tokenizer.vocab_size  # a model may have more rows than its tokenizer has tokens
    return tokenizer.decode([*ids[0].tolist(), *(token for token in new if token < known)])


class HasState(Protocol):
    """What can be saved and go on."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Save:
    """Writes a checkpoint when it is due, at the end, and whenever what is held out has a new best.

    One that is due together with a look is written before it, and again with what it found.

    Args:
        header: What `load_model` needs to know.
        also: What else has a state, by name.
        furnish: Makes sure, before each, that what has to lie beside it is there.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: CheckpointFolder,
        due: Due,
        header: dict[str, str],
        evaluator: Evaluate,
        also: Mapping[str, HasState] | None = None,
        furnish: Callable[[], None] = lambda: None,
    ) -> None:
        self.trainer, self.folder, self.due, self.header = trainer, folder, due, header
        self.evaluator, self.also = evaluator, {"evaluate": evaluator, **(also or {})}
        self.furnish = furnish
        self.saved: tuple[int, float | None] = (-1, None)
        """The step that was saved last, and its loss on what is held out."""
        evaluator.ahead = lambda info: self.save() if self.due(info) else None

    def __call__(self, info: StepInfo) -> None:
        is_best = self.evaluator.looked(info) and self.evaluator.stopping.improved
        if self.due(info) or is_best:
            self.save()

    def save(self) -> None:
        """Now, unless this step is saved already, with all that is known of it."""
        step = self.trainer.step
        loss = self.evaluator.loss_at(step)
        if self.saved == (step, loss):
            return
        tree = self.trainer.state_dict()  # every process: some of it has to be put together
        tree["callbacks"] = {name: callback.state_dict() for name, callback in self.also.items()}
        self.saved = (step, loss)
        if is_main():
            self.furnish()
            self.folder.save(step, tree, self.header, loss)
        barrier()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the other callbacks back what was saved of them; a ValueError if it is nothing of theirs."""
        self.saved = (self.trainer.step, None)
        expect(state, dict, "callbacks")
        for name, callback in self.also.items():
            if name in state:
                callback.load_state_dict(state[name])

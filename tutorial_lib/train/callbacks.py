"""What happens between steps: evaluate, sample, save, show progress, stop when asked.

Each is called with `StepInfo` after every step, and may ask for the end by returning True. All processes call all
of them (under FSDP a forward pass needs everybody); files are written by the first process alone.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tutorial_lib.core.sampler import generate
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.train.checkpoints import CheckpointFolder
from tutorial_lib.train.distributed import barrier, is_main
from tutorial_lib.train.evaluate import EarlyStopping, Evaluation, evaluate
from tutorial_lib.train.loggers import Logger
from tutorial_lib.train.loop import StepInfo
from tutorial_lib.train.trainer import Trainer

__all__ = ["Evaluate", "Sample", "Save", "Show", "Stop"]


class Evaluate:
    """Looks at the validation text every `every` steps and at the end; says stop when it no longer gets better.

    Every process evaluates the same windows: under FSDP they have to walk through the model together.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokens: np.ndarray,
        seq_len: int,
        batch_size: int,
        every: int,
        logger: Logger,
        max_windows: int | None = None,
        bytes_per_token: float = 1.0,
        patience: int | None = None,
    ) -> None:
        self.trainer, self.tokens, self.seq_len, self.batch_size = trainer, tokens, seq_len, batch_size
        self.every, self.logger, self.max_windows = every, logger, max_windows
        self.bytes_per_token = bytes_per_token
        self.stopping = EarlyStopping(patience or 1)
        self.may_stop = patience is not None
        self.last: Evaluation | None = None
        self.step = -1
        """The step of the last evaluation."""

    def __call__(self, info: StepInfo) -> bool:
        if info.step % self.every and info.progress < 1:
            return False
        ema = self.trainer.ema
        model = self.trainer.model if ema is None else ema.module  # what will be used is what is judged
        with self.trainer.precision.autocast():
            self.last = evaluate(
                model, self.tokens, self.seq_len, self.batch_size, self.max_windows, self.bytes_per_token
            )
        self.step = info.step
        values = {"val_loss": self.last.loss, "val_bits_per_byte": self.last.bits_per_byte}
        self.logger.scalars(info.step, values)
        return self.stopping.update(self.last.loss) and self.may_stop

    def loss_at(self, step: int) -> float | None:
        """The loss of that step's evaluation, if there was one."""
        return self.last.loss if self.last is not None and self.step == step else None

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and how long ago."""
        return {"best": self.stopping.best, "bad": self.stopping.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting where an earlier run stopped."""
        self.stopping.best, self.stopping.bad = state["best"], state["bad"]


class Sample:
    """After each evaluation, writes down how the model continues a prompt: always with the same random numbers."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer,
        prompt: str,
        evaluator: Evaluate,
        logger: Logger,
        n: int = 120,
    ) -> None:
        self.trainer, self.tokenizer, self.prompt, self.evaluator = trainer, tokenizer, prompt, evaluator
        self.logger, self.n = logger, n
        self.text = ""

    def __call__(self, info: StepInfo) -> None:
        if self.evaluator.step != info.step:
            return
        ema = self.trainer.ema
        model = self.trainer.model if ema is None else ema.module
        device = next(model.parameters()).device
        ids = torch.tensor([self.tokenizer.encode(self.prompt)], device=device)
        generator = torch.Generator(device).manual_seed(0)
        length = self.evaluator.seq_len
        with self.trainer.precision.autocast():
            new = generate(model, ids, self.n, length, temperature=0.8, top_p=0.95, generator=generator)
            known = self.tokenizer.vocab_size  # a model may have more rows than its tokenizer has tokens
            written = [i for i in map(int, new) if i < known]
        self.text = self.tokenizer.decode([*ids[0].tolist(), *written])
        self.logger.text(info.step, "sample", self.text)


class Save:
    """Writes a checkpoint every `every` steps, at the end, and whenever the validation loss has a new best.

    Args:
        header: What `load_model` needs to know.
        also: Other callbacks with a state, by name.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: CheckpointFolder,
        every: int,
        header: dict[str, str],
        evaluator: Evaluate,
        also: dict[str, Any] | None = None,
    ) -> None:
        self.trainer, self.folder, self.every, self.header = trainer, folder, every, header
        self.evaluator, self.also = evaluator, {"evaluate": evaluator, **(also or {})}
        self.step = -1

    def __call__(self, info: StepInfo) -> None:
        is_best = self.evaluator.step == info.step and self.evaluator.stopping.improved
        if info.step % self.every == 0 or info.progress >= 1 or is_best:
            self.save()

    def save(self) -> None:
        """Now, unless this step is saved already."""
        if self.step == self.trainer.step:
            return
        tree = self.trainer.state_dict()  # every process: some of it has to be put together
        tree["callbacks"] = {name: callback.state_dict() for name, callback in self.also.items()}
        self.step = self.trainer.step
        if is_main():
            self.folder.save(self.step, tree, self.header, self.evaluator.loss_at(self.step))
        barrier()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the other callbacks back what was saved of them."""
        for name, callback in self.also.items():
            if name in state:
                callback.load_state_dict(state[name])


class Show:
    """A progress bar on a terminal; elsewhere a line at each evaluation."""

    def __init__(self, console: Console, evaluator: Evaluate, sample: Sample | None = None) -> None:
        self.console, self.evaluator, self.sample = console, evaluator, sample
        columns = [
            TextColumn("[bold]step {task.fields[step]:>6}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("loss [#4361ee]{task.fields[loss]}[/]  val [#f3722c]{task.fields[val]}[/]"),
            TextColumn("{task.fields[speed]:>9,.0f} tokens/s"),
            TextColumn("ETA {task.fields[eta]}"),
        ]
        self.bar = Progress(*columns, console=console, disable=not (is_main() and console.is_terminal))
        self.fields: dict[str, Any] = {"step": 0, "loss": "–", "val": "–", "speed": 0.0, "eta": "–"}
        self.task = self.bar.add_task("train", total=1.0, **self.fields)
        self._first: StepInfo | None = None

    def __call__(self, info: StepInfo) -> None:
        before = self._first or info
        self._first = before
        seconds, done = info.seconds - before.seconds, info.progress - before.progress
        self.fields.update(step=info.step, loss=f"{info.loss:.3f}")
        if seconds > 0 and done > 0:
            self.fields["speed"] = (info.tokens - before.tokens) / seconds
            self.fields["eta"] = _clock(seconds / done * (1 - info.progress))
        if self.evaluator.step == info.step and self.evaluator.last is not None:
            self.fields["val"] = f"{self.evaluator.last.loss:.3f}"
            if is_main() and not self.console.is_terminal:
                self.console.print(
                    f"step {info.step:>6}  {info.progress:4.0%}  loss {self.fields['loss']}  "
                    f"val {self.fields['val']}  {self.fields['speed']:,.0f} tokens/s  ETA {self.fields['eta']}"
                )
            if is_main() and self.sample is not None and self.sample.text:
                text = "".join(c if c.isprintable() or c == "\n" else "�" for c in self.sample.text)
                self.console.print(f"[dim]── step {info.step} {'─' * 40}[/]")
                self.console.print(text, markup=False, highlight=False)
        self.bar.update(self.task, completed=info.progress, **self.fields)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Stop:
    """Ends the run after the step during which Ctrl-C or a polite kill came; the second Ctrl-C insists.

    with stop.listening():
        trainer.run([…, stop])
    """

    def __init__(self, tell: Callable[[str], None] = lambda sentence: None) -> None:
        self.asked: str | None = None
        self.tell = tell

    def __call__(self, info: StepInfo) -> bool:
        return self.asked is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, SIGINT and SIGTERM are taken for a wish."""
        signals = (signal.SIGINT, signal.SIGTERM)
        old = {name: signal.signal(name, self._hear) for name in signals}
        try:
            yield
        finally:
            for name, handler in old.items():
                signal.signal(name, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        self.tell(f"{self.asked}: stopping after this step, with a checkpoint")

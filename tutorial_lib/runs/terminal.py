"""What the person at the terminal sees of a run and can ask of it: callbacks, too."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tutorial_lib.runs.callbacks import Evaluate, Sample, Stopped
from tutorial_lib.train.distributed import any_of, is_main
from tutorial_lib.train.loop import StepInfo

__all__ = ["Show", "Stop", "printable"]

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tabs and new lines, what turns the direction of writing round, and halves of characters."""

T = TypeVar("T")
SILENCE = 10
"""Seconds of a look after which a line says how far it is, where there is no bar."""


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
        self._spoke = 0.0

    def looking(self, done: int, of: int | None) -> None:
        """How far a look at what is held out has come."""
        so_far = f"{done}/{of or '…'}"
        self.bar.update(self.task, val=so_far)
        now = time.monotonic()
        self._spoke = now if done == 1 else self._spoke
        if is_main() and not self.console.is_terminal and now - self._spoke > SILENCE:
            self._spoke = now
            self.console.print(f"validating: batch {so_far}")

    def __call__(self, info: StepInfo) -> None:
        before = self._first or info
        self._first = before
        seconds, done = info.seconds - before.seconds, info.progress - before.progress
        self.fields.update(step=info.step, loss=f"{info.loss:.3f}")
        if seconds > 0 and done > 0:
            self.fields["speed"] = (info.tokens - before.tokens) / seconds
            self.fields["eta"] = _clock(seconds / done * (1 - info.progress))
        if self.evaluator.looked(info):
            self.fields["val"] = f"{self.evaluator.loss:.3f}"
            if is_main() and not self.console.is_terminal:
                self.console.print(
                    f"step {info.step:>6}  {info.progress:4.0%}  loss {self.fields['loss']}  "
                    f"val {self.fields['val']}  {self.fields['speed']:,.0f} tokens/s  ETA {self.fields['eta']}"
                )
        if is_main() and self.sample is not None and self.sample.step == info.step:
            self.console.print(f"[dim]── step {info.step} {'─' * 40}[/]")
            self.console.print(printable(self.sample.text), markup=False, highlight=False)
        self.bar.update(self.task, completed=info.progress, **self.fields)


def printable(text: str) -> str:
    """Without what a terminal would obey: an untrained model writes it by chance, and a stranger on purpose."""
    return OBEYED.sub("�", text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Stop:
    """Ends the run after the step during which Ctrl-C or a polite kill came, and a look at once; the third Ctrl-C insists.

    with stop.listening():
        trainer.run([…, stop])
    """

    def __init__(self, tell: Callable[[str], None] = lambda sentence: None) -> None:
        self.asked: str | None = None
        self.tell = tell
        self.looking: Callable[[int, int | None], None] = lambda done, of: None
        """Is told how far a look has come."""
        self._warned = False

    def __call__(self, info: StepInfo) -> bool:
        return self.asked is not None

    def through(self, items: Iterable[T], of: int | None = None) -> Iterator[T]:
        """The items of a look, one by one; of `of`, if that is known.

        Raises:
            Stopped: when the end is asked for. Under torchrun all processes stop at the same item.
        """
        for done, item in enumerate(items, 1):
            if any_of(self.asked is not None):
                raise Stopped
            yield item
            self.looking(done, of)

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
        if self.asked is None:
            self.asked = signal.Signals(number).name
            self.tell(f"{self.asked}: stopping after this step, with a checkpoint")
        elif number == signal.SIGINT and self._warned:
            raise KeyboardInterrupt
        elif (
            number == signal.SIGINT
        ):  # an impatient finger must not take back what the first one was promised
            self._warned = True
            self.tell("still at this step or its checkpoint: a third Ctrl-C ends at once, without it")

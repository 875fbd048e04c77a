# Exported from chapters/part_4_scaling_up/4_5_logging.ipynb. Edit the lesson, then run: make export
"""Where a run's numbers go: a CSV table, TensorBoard, wandb.

Every logger has the same four methods, and ignores what it cannot hold. With `resume_step` it continues the log of
a run that went back to the checkpoint of that step: what was logged after it is dropped, and will be logged again.
"""

import csv
import html
import io
import os
import secrets
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tutorial_lib.files import write_text

__all__ = ["Logger", "CSVLogger", "TensorBoardLogger", "WandbLogger", "Loggers"]


def _say(sentence: str) -> None:
    """One line on stderr, where it does not mix with what a program prints as its result."""
    print(sentence, file=sys.stderr)


def _without(package: str) -> ImportError:
    """The error for an optional package that is not there."""
    return ImportError(f'logging to {package} needs an extra: pip install "llm-from-scratch[logging]"')


def _finite(values: Tensor) -> Tensor:
    """The finite numbers of a tensor in one line `(N,)`: a histogram of a diverging run must not end it."""
    values = values.detach().float().flatten().cpu()
    return values[values.isfinite()]


class Logger:
    """A log that holds nothing; the others say which of the four methods they mean."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after so many steps. What is known now and then comes now and then."""

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """How the numbers of a tensor of any shape are distributed."""

    def text(self, step: int, name: str, text: str) -> None:
        """A sample."""

    def close(self) -> None:
        """Write what is still in memory. Nothing may be logged afterwards."""


class CSVLogger(Logger):
    """A table with a column for each name and a row for each call of `scalars`; it opens in any spreadsheet.

    Every row is on its way to the disk when the call returns, so a killed process loses none. A name that is
    new makes a new column: the table is then written once more, whole or not at all. Cells that a call says
    nothing about are empty. Histograms and texts are ignored.

    Args:
        path: The file. Without `resume_step`, an existing one is replaced.
        resume_step: Keep the rows up to this step. A last line that a kill cut short is dropped.

    Raises:
        ValueError: if the file to be continued is no such table.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.columns, rows = ["step"], []
        if resume_step is not None and self.path.is_file():
            self.columns, rows = self._read()
            rows = [row for row in rows if int(row[0]) <= resume_step]
        self._write(rows)

    def _read(self) -> tuple[list[str], list[list[str]]]:
        """The columns and the whole rows; a line without an end is half a line."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole, _, _ = text.rpartition("\n")
        columns, *rows = list(csv.reader(io.StringIO(whole))) or [["step"]]
        if columns[0] != "step":
            raise ValueError(f"{self.path} is no table of steps, so it cannot be continued")
        return columns, [row for row in rows if len(row) == len(columns) and row[0].isdigit()]

    def _write(self, rows: list[list[str]]) -> None:
        """The whole table anew; afterwards the file is open for more rows."""
        table = io.StringIO()
        width = len(self.columns)
        padded = (row + [""] * (width - len(row)) for row in rows)
        csv.writer(table, lineterminator="\n").writerows([self.columns, *padded])
        write_text(self.path, table.getvalue())
        self._file = open(self.path, "a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, lineterminator="\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row. A 0-dimensional tensor will do, and becomes a number here."""
        row = {name: float(value) for name, value in values.items()} | {"step": step}
        new = [name for name in row if name not in self.columns]
        is_there = self.path.is_file()  # somebody may have removed it, and the rows would go nowhere
        if new or not is_there:
            self._file.close()
            rows = self._read()[1] if is_there else []
            self.columns = self.columns + new
            self._write(rows)
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger(Logger):
    """Event files for `tensorboard --logdir FOLDER`, written every ten seconds.

    Args:
        folder: Files of an earlier run stay in it; TensorBoard is told to hide what they say after
            `resume_step`, or all of it when that is None.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _without("tensorboard") from None
        hide_from = 0 if resume_step is None else resume_step + 1
        self._folder = Path(folder)
        self._writer = SummaryWriter(str(folder), purge_step=hide_from, flush_secs=10)

    def _stay(self) -> Any:
        """The writer, in a folder that is there: its thread would die of one that somebody has removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point on each name's curve."""
        for name, value in values.items():
            self._stay().add_scalar(name, float(value), step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """The finite ones are drawn; without any, nothing is."""
        if (values := _finite(values)).numel():
            self._stay().add_histogram(name, values, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Indented by four spaces: TensorBoard takes text for Markdown, where that means "as it stands"."""
        self._stay().add_text(name, textwrap.indent(text, "    ", lambda line: True), step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._stay().close()


class WandbLogger(Logger):
    """A run on wandb. Without a key or a network it stays on the disk, and one line says how to send it later.

    It never asks for a key. `WANDB_MODE` decides where it is set ("online" without a key is offline, too).

    Args:
        folder: Gets a folder `wandb`, and the run's id in `wandb-id.txt`.
        resume_step: Continue the run of that id. What wandb holds already, it keeps: the same steps are not
            taken twice.

    Raises:
        ImportError: if wandb is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise _without("wandb") from None
        folder, self._wandb = Path(folder), wandb
        id_file = folder / "wandb-id.txt"
        goes_on = resume_step is not None and id_file.is_file()
        run_id = id_file.read_text(encoding="utf-8").strip() if goes_on else secrets.token_hex(4)
        write_text(id_file, run_id)
        quiet = wandb.Settings(silent=True, console="off", init_timeout=20)
        about = {"dir": str(folder), "project": project, "name": name, "config": dict(config or {})}
        about |= {"id": run_id, "settings": quiet}
        wandb.setup(quiet)
        mode, why = os.environ.get("WANDB_MODE", "online"), ""
        if mode == "online" and not self._has_key():
            mode, why = "offline", "no key was found (`wandb login` stores one)"
        try:
            self._run = wandb.init(
                mode=mode, resume="allow" if goes_on and mode == "online" else None, **about
            )
        except Exception as error:  # no network, a wrong key, a server that is down
            mode, why = "offline", f"the server does not answer ({str(error).splitlines()[0][:120]})"
            wandb.teardown()  # it still holds the id
            wandb.setup(quiet)
            self._run = wandb.init(mode=mode, **about)
        if why:
            _say(f"wandb: {why}; the run stays here, send it with: wandb sync {Path(self._run.dir).parent}")
        elif mode == "online":
            _say(f"wandb: {self._run.url}")

    def _has_key(self) -> bool:
        try:
            return self._wandb.login(prompt=False, verify=False)
        except TypeError:  # an older wandb, which has no such argument
            return self._wandb.api.api_key is not None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point on each name's curve."""
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """The finite ones are drawn; without any, nothing is."""
        if (values := _finite(values)).numel():
            self._run.log({name: self._wandb.Histogram(values.numpy())}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """As a small page of HTML, which keeps the line breaks."""
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """Wait until wandb has written, or sent, everything."""
        self._run.finish()


class Loggers(Logger):
    """Several loggers as one. One that fails is reported once and left out from then on: the run goes on.

    Args:
        report: Is given the sentence about a logger that failed.
    """

    def __init__(self, loggers: Iterable[Logger], report: Callable[[str], None] = _say) -> None:
        self.loggers, self._report = list(loggers), report

    def _tell(self, method: str, *arguments: Any) -> None:
        for logger in list(self.loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # a full disk, a server that is gone: not worth the run
                self.loggers.remove(logger)
                self._report(f"{type(logger).__name__} failed and is left out from here on: {error}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """To all of them."""
        self._tell("scalars", step, values)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """To all of them."""
        self._tell("histogram", step, name, values)

    def text(self, step: int, name: str, text: str) -> None:
        """To all of them."""
        self._tell("text", step, name, text)

    def close(self) -> None:
        """Close all of them."""
        self._tell("close")

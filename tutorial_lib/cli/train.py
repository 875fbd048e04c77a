"""`llm-scratch train`: pretrain a model as a configuration says. Runs of other sorts have the same options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from tutorial_lib.cli.common import INTERRUPTED, console, run_alone, sentences, speak
from tutorial_lib.runs.config import Config, load_config
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.runs.run import Outcome
from tutorial_lib.train.distributed import is_main, stop

__all__ = ["ConfigFile", "DryRun", "Overrides", "Resume", "carry_out_from", "train"]

Overrides: TypeAlias = Annotated[
    list[str] | None, typer.Argument(help="Settings over the file's: train.lr=2e-4", show_default=False)
]
ConfigFile: TypeAlias = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file; configs/ has some.", show_default=False)
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if there is one.")
]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Print parameters, FLOPs, memory and time; write nothing.")
]


def train(
    overrides: Overrides = None, config: ConfigFile = None, resume: Resume = False, dry_run: DryRun = False
) -> None:
    """Train a model: llm-scratch train --config configs/tiny.yaml train.lr=2e-4

    Ctrl-C ends it after the step, with a checkpoint, and exit code 130. For several devices:
    torchrun --nproc-per-node 2 -m tutorial_lib.cli.train --config configs/base.yaml
    """
    carry_out_from(config, overrides or (), resume, dry_run, Config, pretrain)


def carry_out_from(
    path: Path | None,
    overrides: Sequence[str],
    resume: bool,
    dry_run: bool,
    shape: type[Config],
    run: Callable[..., Outcome],
) -> None:
    """Read a configuration, do what it says, and say how it ended."""
    with sentences():
        settings: Any = load_config(path, overrides, shape)
        if settings.log.name is None:
            settings.log.name = path.stem if path is not None else "run"
        if dry_run:
            from tutorial_lib.cli.dry_run import report

            report(settings)
            return
        outcome = run(settings, resume, console)
        speaks = is_main()  # without the group, every process is the main one
        stop()  # not after an error: leaving would wait for processes that wait for this one
    if not speaks:
        return
    best = f", best validation loss {outcome.best:.4f}" if outcome.best < float("inf") else ""
    if outcome.last is None:
        speak(f"{outcome.folder} has nothing left to do: train.steps or train.max_seconds is reached{best}")
    else:
        speak(
            f"step {outcome.last.step} after {outcome.last.seconds:.0f} s{best}: {outcome.folder}/latest.ckpt"
        )
    if outcome.stopped_early:
        speak(f"stopped early: no gain in {settings.train.patience} evaluations (train.patience)")
    if outcome.stopped_by:
        speak("go on with --resume")
        raise typer.Exit(INTERRUPTED)


if __name__ == "__main__":
    run_alone(train)

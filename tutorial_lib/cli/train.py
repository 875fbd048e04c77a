"""`llm-scratch train`: pretrain a model as a configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutorial_lib.cli.common import INTERRUPTED, console, run_alone, sentences, speak
from tutorial_lib.runs.config import load_config
from tutorial_lib.runs.pretrain import pretrain
from tutorial_lib.train.distributed import is_main, stop

__all__ = ["train"]


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: train.lr=2e-4", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A YAML file; configs/ has some.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if there is one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, FLOPs, memory and time; write nothing.")
    ] = False,
) -> None:
    """Train a model: llm-scratch train --config configs/tiny.yaml train.lr=2e-4

    Ctrl-C ends it after the step, with a checkpoint, and exit code 130. For several devices:
    torchrun --nproc-per-node 2 -m tutorial_lib.cli.train --config configs/base.yaml
    """
    with sentences():
        settings = load_config(config, overrides or ())
        if settings.log.name is None:
            settings.log.name = config.stem if config is not None else "run"
        if dry_run:
            from tutorial_lib.cli.dry_run import report

            report(settings)
            return
        outcome = pretrain(settings, resume, console)
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

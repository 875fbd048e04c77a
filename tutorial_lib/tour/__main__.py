"""`make tour`, or `python -m tutorial_lib.tour --seconds 60 --dataset "my_text/*.txt"`.

Exit code: 0 when the tour is finished, 1 when it could not be, 130 after Ctrl-C or a polite kill (with a usable checkpoint).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tutorial_lib.data.corpora import CorpusError
from tutorial_lib.runs.terminal import printable
from tutorial_lib.tour.recipes import RECIPES, with_seconds
from tutorial_lib.tour.report import write_report
from tutorial_lib.tour.run import run
from tutorial_lib.train.trainer import DivergedError


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tutorial_lib.tour", description=__doc__)
    parser.add_argument("--seconds", type=_positive, help="seconds of training (the tour's own: 120)")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="tour")
    parser.add_argument("--dataset", default="shakespeare", help="a corpus, or a pattern such as 'my/*.txt'")
    parser.add_argument("--out", type=Path, help="folder for the results (default: runs/RECIPE)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    console = Console()
    recipe = RECIPES[args.recipe]
    if args.seconds is not None:
        recipe = with_seconds(recipe, args.seconds)
    folder: Path = args.out or Path("runs") / args.recipe
    try:
        folder.mkdir(parents=True, exist_ok=True)
        story = run(recipe, args.dataset, folder, args.seed, console)
        report = write_report(story, folder)
    except KeyboardInterrupt:
        console.print("Stopped at once: what the last checkpoint has is all there is.")
        return 130
    except (CorpusError, DivergedError, ValueError, OSError) as error:
        console.print(
            f"[bold red]The tour stopped:[/] {escape(printable(str(error)))}", highlight=False, soft_wrap=True
        )
        return 1
    if story.interrupted:
        console.print(
            f"Stopped after step {story.steps}. A usable checkpoint: {escape(str(folder / 'latest.ckpt'))}"
        )
        console.print(f"The report so far: {escape(str(report))}", highlight=False, soft_wrap=True)
        return 130
    console.print(
        f"[bold]{story.loss:.3f} nats/byte[/] ({story.bits_per_byte:.2f} bits) on the last tenth, after "
        f"{story.steps:,} steps in {story.seconds:.0f} s"
    )
    for name, bits in sorted(story.baselines.items(), key=lambda item: -item[1]):
        console.print(f"  {name:<36} {bits:.2f} bits per byte", highlight=False)
    console.print(f"Open [bold]{escape(str(report))}[/]", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

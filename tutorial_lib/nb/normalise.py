"""Bring every notebook to one form, so that running it again gives a small diff.

    python -m tutorial_lib.nb.normalise [PATH…]             notebooks or folders; default: chapters/ and solutions/
    python -m tutorial_lib.nb.normalise --check [PATH…]     write nothing; whoever ran a lesson did nothing wrong
    python -m tutorial_lib.nb.normalise --published [PATH…]   the same to the letter, and lessons fit to be read
    python -m tutorial_lib.nb.normalise --execute PATH…     run lessons, store outputs, say what was slow

The only sources it writes are those of the badge and of the setup cell; every other cell keeps its text to the
letter. exercises/ are written in this form by `make exercises`, and from then on belong to the learner.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from queue import Empty
from typing import Any

from nbformat import NotebookNode

from tutorial_lib.nb.digests import tags_of
from tutorial_lib.nb.form import normalise
from tutorial_lib.nb.graph import ROOT
from tutorial_lib.nb.notebooks import dumps, notebooks, read_notebook, tree_of

SIZE_LIMIT_KB = 600
A_MACHINE = re.compile(r"/(work|root|tmp|home/\w+)/[\w.]|ipykernel_\d+")
NOT_NORMAL = "is not in normal form, run: make notebooks"
CELL_TIMEOUT = 300


def _look_again(channel: Any) -> None:
    """Make the kernel's shell channel look for replies five times a second, and not only when it is woken.

    A lesson with `interact` makes nbclient send widget messages on the very socket on which it waits for the
    cell's reply. Now and then that swallows the wake-up, and the finished cell waits for its whole timeout.
    """
    once = channel.get_msg

    async def get_msg(timeout: float | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                return await once(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() >= deadline:
                    raise

    channel.get_msg = get_msg


def execute(path: Path, root: Path = ROOT) -> str:
    """Run a lesson, store its normalised outputs, and return one line: seconds, size, slowest cells."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = path.resolve()
    if tree_of(path, root) != "chapters":
        raise ValueError(f"{path}: only lessons keep their outputs, so only chapters/ are executed.")
    name = path.relative_to(root).as_posix()
    nb = normalise(read_notebook(path), name, root)
    started: dict[int, float] = {}
    took: dict[int, float] = {}

    def tick(cell: NotebookNode, cell_index: int) -> None:
        started[cell_index] = time.perf_counter()

    def tock(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        took[cell_index] = time.perf_counter() - started[cell_index]

    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_notebook_start=lambda notebook: _look_again(client.kc.shell_channel),
        on_cell_start=tick,
        on_cell_executed=tock,  # not on_cell_complete, which comes before the reply
    )
    begin = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ValueError(
            f"{path}, cell {max(started, default=0) + 1}, failed; nothing was written.\n{error}"
        ) from error
    seconds = time.perf_counter() - begin
    text = dumps(normalise(nb, name, root))
    path.write_text(text, encoding="utf-8")
    size = len(text.encode()) / 1024
    slowest = ", ".join(f"cell {i + 1} {took[i]:.1f} s" for i in sorted(took, key=took.__getitem__)[:-4:-1])
    warning = f"   over the limit of {SIZE_LIMIT_KB} KB!" if size > SIZE_LIMIT_KB else ""
    return f"{path.relative_to(root)}   {seconds:.1f} s   {size:.0f} KB   slowest: {slowest}{warning}"


def _name(path: Path, root: Path) -> str:
    """A notebook's path below the root, which begins with its tree."""
    tree_of(path, root)
    return path.relative_to(root).as_posix()


def _faults(path: Path, root: Path, published: bool) -> list[str]:
    """What a check finds in a notebook: sources that are not stamped, and in a published one whatever else differs."""
    nb, text = read_notebook(path), path.read_text(encoding="utf-8")
    name = _name(path, root)
    new = normalise(nb, name, root)
    if not published:
        return [NOT_NORMAL] if _as_written(nb) != _as_written(new) else []
    faults = [NOT_NORMAL] if dumps(new) != text else []
    if name.startswith("chapters/"):
        outputs = [output for cell in nb.cells for output in cell.get("outputs", [])]
        if not outputs:
            faults.append("has no outputs, so nobody can read it on the web: run it with --execute")
        if any(output.output_type == "error" for output in outputs):
            faults.append("shows an error that it does not catch: mend that cell, or catch the error in it")
    if found := A_MACHINE.search(text):
        faults.append(f"shows a folder of one machine ({found[0]}): print less of the path")
    if len(text.encode()) > SIZE_LIMIT_KB * 1000:
        faults.append(f"is larger than {SIZE_LIMIT_KB} KB: fewer or smaller pictures")
    return faults


def _as_written(nb: NotebookNode) -> list[tuple]:
    """What people write in a notebook, and a run does not."""
    return [(cell.cell_type, cell.source, tags_of(cell)) for cell in nb.cells]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_lib.nb.normalise", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, help="notebooks or folders (default: all but exercises/)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; list what is not stamped")
    how.add_argument("--published", action="store_true", help="write nothing; list whatever would change")
    how.add_argument("--execute", action="store_true", help="run the lessons named and store their outputs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    args = parser.parse_args(argv)
    if args.execute and not args.paths:
        parser.error("--execute takes the lessons to run")
    root = args.root.resolve()
    try:
        files = notebooks(root, args.paths)
        if args.execute:
            for path in files:
                print(execute(path, root), flush=True)
            return 0
        if args.check or args.published:
            found = {path: _faults(path, root, args.published) for path in files}
            for path, faults in found.items():
                print(*(f"{path.relative_to(root)} {fault}\n" for fault in faults), sep="", end="")
            print(f"{len(files)} notebooks, {sum(map(bool, found.values()))} to mend")
            return 1 if any(found.values()) else 0
        new = {path: dumps(normalise(read_notebook(path), _name(path, root), root)) for path in files}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    changed = [path for path in files if path.read_text(encoding="utf-8") != new[path]]
    for path in changed:
        print(f"{path.relative_to(root)} normalised")
        path.write_text(new[path], encoding="utf-8")
    print(f"{len(files)} notebooks, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

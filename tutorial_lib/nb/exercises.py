"""Write the exercises from their solutions, and never over a learner's work.

    python -m tutorial_lib.nb.exercises [--check | --published] [--root DIR]

exercises/manifest.json remembers what was generated. A file whose cells still hash to what it says is an
untouched stub and may be replaced or removed; any other file is somebody's work and is left alone, and said.
So --check has nothing against a learner's work, nor against a stub that was run; --published, for CI, has.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutorial_lib.files import write_text
from tutorial_lib.nb.digests import cells_digest
from tutorial_lib.nb.graph import ROOT
from tutorial_lib.nb.stubs import ExerciseError, make_stub

__all__ = ["Outcome", "regenerate"]


@dataclass
class Outcome:
    """What a run found, a line each; `drift` and `errors` make it fail."""

    check: bool = False
    """Write nothing; what would be written is `drift`."""
    published: bool = False
    """With `check`: work, and the traces of a run, are `drift` as well."""
    written: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def regenerate(root: Path = ROOT, check: bool = False, published: bool = False) -> Outcome:
    """Bring exercises/ up to date with solutions/; see `Outcome` for `check` and `published`."""
    solutions, exercises, manifest = root / "solutions", root / "exercises", root / "exercises/manifest.json"
    sources, present = _notebooks(solutions), _notebooks(exercises)
    if present and not solutions.is_dir():
        raise ExerciseError(f"{root} has no solutions/ to make exercises from: restore it, or pass --root.")
    old, new = _read_manifest(manifest), {}
    done = Outcome(check, published)
    for name in sorted({*sources, *present}):
        bring_up_to_date = _renew if name in sources else _retire
        if entry := bring_up_to_date(root, name, old.get(name, {}), done):
            new[name] = entry
    if new != old and check:
        done.drift.append("exercises/manifest.json is not up to date, run: make exercises")
    elif new != old:
        content = json.dumps({"notebooks": new}, indent=2, sort_keys=True, ensure_ascii=False)
        write_text(manifest, content + "\n")
    return done


def _renew(root: Path, name: str, was: dict[str, Any], done: Outcome) -> dict[str, Any]:
    """Make an exercise from its solution. Returns what the manifest is to say of it; it said `was`."""
    # Here, so that without nbformat main() can say what to install.
    from tutorial_lib.nb.form import normalise
    from tutorial_lib.nb.notebooks import dumps, read_notebook

    path, shown = root / "exercises" / name, f"exercises/{name}"
    try:
        nb = read_notebook(root / "solutions" / name)
        stubs = make_stub(nb)
        nb = normalise(nb, shown, root)
    except ValueError as error:
        place = "" if str(root / "solutions") in str(error) else f"solutions/{name}, "
        done.errors.append(f"{place}{error}")
        return was
    entry, fresh = {"sha256": cells_digest(nb), "stubs": stubs}, dumps(nb)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    digest = _digest_of(text) if text is not None else None
    if text == fresh or (done.check and not done.published and digest == entry["sha256"]):
        return entry
    if text is not None and digest not in (was.get("sha256"), entry["sha256"]):
        news = "its stub has not changed" if was == entry else "a newer stub waits"
        _leave(done, f"{shown} holds your work ({news}): for a fresh one, move it away and make exercises")
        return was  # the checker compares this file with the stub it grew from
    if done.check:
        state = "is missing" if text is None else "differs from what its solution generates"
        done.drift.append(f"{shown} {state}, run: make exercises")
    else:
        write_text(path, fresh)
        done.written.append(f"wrote {shown}")
    return entry


def _retire(root: Path, name: str, was: dict[str, Any], done: Outcome) -> dict[str, Any]:
    """Remove an exercise whose solution is gone. Returns what the manifest is to say of it; it said `was`."""
    path, shown = root / "exercises" / name, f"exercises/{name}"
    if _digest_of(path.read_text(encoding="utf-8", errors="replace")) != was.get("sha256"):
        _leave(done, f"{shown} has no solution, but holds your work: move it away, or delete it")
        return was
    if done.check:
        done.drift.append(f"{shown} has no solution any more, run: make exercises")
    else:
        path.unlink()
        done.written.append(f"removed {shown}, it has no solution any more")
    return {}


def _leave(done: Outcome, line: str) -> None:
    """Somebody's work stays as it is. That is no fault, except in what is published."""
    (done.drift if done.published else done.left).append(line)


def _notebooks(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*.ipynb"))
    return {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}


def _digest_of(text: str) -> str:
    """The cells digest of a notebook file; of something else, a word that no manifest holds."""
    try:
        return cells_digest(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "unreadable"


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        notebooks = json.loads(path.read_text(encoding="utf-8"))["notebooks"]
        if all(isinstance(entry, dict) for entry in notebooks.values()):
            return notebooks
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ExerciseError(
        f"{path} cannot be read: restore it from git (without it, every change is your work)."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tutorial_lib.nb.exercises", description=__doc__.split("\n")[0]
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    how.add_argument("--published", action="store_true", help="the same, and nobody's work or run is in it")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    args = parser.parse_args(argv)
    try:
        done = regenerate(args.root.resolve(), args.check or args.published, args.published)
    except ExerciseError as error:
        print(error, file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"Making exercises takes nbgrader ({error}): pip install nbgrader", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}. Mend that and try again.", file=sys.stderr)
        return 1
    left = [] if args.check else [f"left alone: {line}" for line in done.left]
    for line in (*done.written, *left, *done.drift):
        print(line)
    for line in done.errors:
        print(line, file=sys.stderr)
    return 1 if done.drift or done.errors else 0


if __name__ == "__main__":
    sys.exit(main())

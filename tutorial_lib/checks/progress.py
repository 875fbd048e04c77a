"""What a learner has done, in `.llm-scratch/progress.json` beside the course."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutorial_lib.checks.grade import Result
from tutorial_lib.checks.gradings import all_exercises
from tutorial_lib.checks.notebook import find_home, notebook_of, statements
from tutorial_lib.checks.spec import Exercise
from tutorial_lib.files import write_text

__all__ = ["next_hint", "overview", "record", "recorded"]


def _file() -> Path | None:
    home = find_home()
    return home / ".llm-scratch" / "progress.json" if home else None


def _load() -> dict[str, Any]:
    try:
        state = json.loads(_file().read_text(encoding="utf-8"))  # type: ignore[union-attr]
        return {"status": dict(state["status"]), "hints": dict(state["hints"])}
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return {"status": {}, "hints": {}}  # no file yet, or one that was damaged: start over


def _save(state: dict[str, Any]) -> None:
    file = _file()
    if file is None:
        return
    try:
        write_text(file, json.dumps(state, indent=1, sort_keys=True))
    except OSError:
        pass  # a folder that cannot be written to must not keep anybody from checking an exercise


def record(results: Iterable[Result]) -> None:
    """Remember the latest status of each exercise."""
    state = _load()
    state["status"].update({result.id: result.status for result in results})
    _save(state)


def recorded(exercise_id: str) -> str:
    """The status that was remembered last, or ""."""
    return str(_load()["status"].get(exercise_id, ""))


def next_hint(exercise: Exercise, show_all: bool = False) -> str:
    """The next rung of an exercise's ladder of hints; each call goes one rung further."""
    home = find_home()
    path = notebook_of(exercise.lesson, home / "solutions") if home else None
    if path is None:
        return f"The notebook of lesson {exercise.lesson} is not here."
    hints = statements(path)[exercise.id].hints
    state = _load()
    seen = min(int(state["hints"].get(exercise.id, 0)), len(hints))
    if not show_all and seen == len(hints):
        return (
            f"Those were all {len(hints)} hints for {exercise.id} (ARGS=--all shows them again). "
            f"The solution, explained: {path.relative_to(home)}"
        )
    wanted = range(len(hints)) if show_all else [seen]
    if not show_all:
        state["hints"][exercise.id] = seen + 1
        _save(state)
    return "\n\n".join(f"Hint {i + 1} of {len(hints)} for {exercise.id}\n\n{hints[i]}" for i in wanted)


def overview() -> str:
    """Done, next and percent, part by part."""
    status = _load()["status"]
    exercises = all_exercises()
    lines, parts = [], sorted({e.part for e in exercises.values()})
    for part in parts:
        mine = [e for e in exercises.values() if e.part == part]
        done = sum(status.get(e.id) == "passed" for e in mine)
        bar = "█" * round(20 * done / len(mine))
        lines.append(f"  Part {part}  {bar:·<20}  {done:>2} of {len(mine)}  {100 * done / len(mine):3.0f} %")
    done = sum(status.get(e) == "passed" for e in exercises)
    lines.append(f"  All     {done} of {len(exercises)} exercises done")
    todo = next((e for e in exercises.values() if status.get(e.id) != "passed"), None)
    if todo is None:
        lines.append("  Next    nothing left: you built it all")
    else:
        home = find_home()
        path = notebook_of(todo.lesson, home / "exercises") if home else None
        where = path.relative_to(home) if path and home else "exercises/"
        lines.append(f"  Next    {todo.id} {todo.symbol}, in {where}")
    return "\n".join(lines)

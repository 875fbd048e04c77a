"""Run an exercise's probes on a learner's object, and say what happened in one sentence."""

from __future__ import annotations

import functools
import inspect
import random
import traceback
import types
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tutorial_lib.checks.guard import explain_crash, guarded
from tutorial_lib.checks.probes import brief
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe, same_value

__all__ = ["Result", "Status", "grade"]

Status = str  # "passed" | "wrong" | "crashed" | "not started"


@dataclass
class Result:
    """What the checker found out about one exercise."""

    id: str
    symbol: str
    status: Status
    probes: dict[str, str] = field(default_factory=dict)
    """Each probe's name with "passed", "failed" or "not run"."""
    sentence: str = ""
    """What is wrong, in one sentence."""
    table: dict[str, str] = field(default_factory=dict)
    """Input, yours and expected, to put side by side."""
    diagnosis: str = ""
    """Name of the misconception whose numbers these are, if any."""
    explanation: str = ""
    """What that misconception is."""
    look_again: str = ""
    """Heading in the lesson."""
    details: str = ""
    """The traceback, for --verbose."""

    @property
    def passed(self) -> bool:
        """Whether every probe passes."""
        return self.status == "passed"

    def to_json(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)

    def __repr__(self) -> str:
        from tutorial_lib.checks.report import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from tutorial_lib.checks.report import as_html

        return as_html(self)


@torch.enable_grad()  # whatever the learner's code switches, the caller's setting comes back
def grade(exercise: Exercise, learner: Any, seconds: float = 20.0) -> Result:
    """Run the probes in order and stop at the first that does not pass."""
    result = Result(exercise.id, exercise.symbol, "passed", look_again=exercise.look_again)
    result.probes = {probe.name: "not run" for probe in exercise.probes}
    for probe in exercise.probes:
        expected = run_probe(probe, exercise.reference)
        try:
            with guarded(seconds):
                yours = run_probe(probe, learner)
                failure = _left_behind() or probe.judge(yours, expected)
        except NotImplementedError:
            result.status, result.probes = "not started", {p.name: "not run" for p in exercise.probes}
            result.sentence = "the stub is still there: replace the line `raise NotImplementedError`"
            return result
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            result.status, result.probes[probe.name] = "crashed", "failed"
            result.sentence = explain_crash(error, seconds)
            if isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error):
                result.sentence = _nothing_returned(exercise, probe, learner) or result.sentence
            elif left := _left_behind():
                result.sentence = left.sentence
            result.details = "".join(traceback.format_exception(error))
            return result
        if failure is not None:
            result.status, result.probes[probe.name] = "wrong", "failed"
            if nothing := _nothing_returned(exercise, probe, learner):
                result.sentence = nothing
            else:
                _describe(result, exercise, probe, learner, yours, expected, failure)
            return result
        result.probes[probe.name] = "passed"
    return result


def _left_behind() -> Failure | None:
    """A switch of torch's, for the whole process, that learner code has turned and not turned back."""
    if torch.is_grad_enabled():
        return None
    return Failure(
        "gradients are still switched off when your code is done, so nothing that runs after it can be trained: "
        "`with torch.no_grad():` switches them on again at its end"
    )


def run_probe(probe: Probe, thing: Any) -> Any:
    """One probe, from the same random state each time."""
    random.seed(0)
    np.random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return probe.run(thing)


def _describe(
    result: Result,
    exercise: Exercise,
    probe: Probe,
    learner: Any,
    yours: Any,
    expected: Any,
    failure: Failure,
) -> None:
    result.sentence = failure.sentence
    if probe.given is not None:
        result.table["input"] = probe.given if isinstance(probe.given, str) else brief(probe.given)
    result.table.update(failure.table)
    if found := diagnose(exercise, probe, learner, yours, expected):
        result.diagnosis, result.explanation = found.name, found.sentence


def diagnose(
    exercise: Exercise, probe: Probe, learner: Any, yours: Any, expected: Any
) -> Misconception | None:
    """The misconception that gives the learner's numbers on the failed probe, and on all others too.

    Only a match in value counts, of a misconception that passes what the learner's code has passed. Where
    several match on this probe, the others decide; then the first.
    """
    passed = exercise.probes[: list(exercise.probes).index(probe)]
    matching = [
        m
        for m in exercise.misconceptions
        if _gives(m, probe, yours)
        and not _gives(m, probe, expected)
        and all(_passes(m, other, run_probe(other, exercise.reference)) for other in passed)
    ]
    for other in exercise.probes:
        if len(matching) < 2:
            break
        try:
            with guarded(5.0):
                result = run_probe(other, learner)
        except BaseException:
            continue
        matching = [m for m in matching if _gives(m, other, result)] or matching
    return matching[0] if matching else None


def _passes(misconception: Misconception, probe: Probe, expected: Any) -> bool:
    try:
        return probe.judge(run_probe(probe, misconception.wrong), expected) is None
    except Exception:
        return False


def _gives(misconception: Misconception, probe: Probe, result: Any) -> bool:
    try:
        return same_value(run_probe(probe, misconception.wrong), result)
    except Exception:
        return False


def _nothing_returned(exercise: Exercise, probe: Probe, learner: Any) -> str:
    """The sentence on a forgotten `return`: if something of the learner's gave None that should not, else ""."""

    def may(name: str) -> bool:
        signature = getattr(getattr(learner, name, learner), "__annotations__", {})
        return any(word in str(signature.get("return", "")) for word in ("None", "Optional"))

    fine = _gave_none(exercise, probe, exercise.reference)
    guilty = [name for name in _gave_none(exercise, probe, learner) if name not in fine and not may(name)]
    return f"`{guilty[-1]}` returned None: is a `return` missing?" if guilty else ""


def _gave_none(exercise: Exercise, probe: Probe, thing: Any) -> list[str]:
    """Who returns None in this probe: the function, or methods of the class that the exercise asks for."""
    names: list[str] = []
    is_reference = thing is exercise.reference

    def watched(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = function(*args, **kwargs)
            except Exception:
                if is_reference:  # where an error is right, None is no forgotten `return`
                    names.append(name)
                raise
            if result is None:
                names.append(name)
            return result

        return call

    try:
        with guarded(5.0):
            if isinstance(thing, type):
                asked = {
                    name for c in exercise.reference.__mro__ if c not in nn.Module.__mro__ for name in vars(c)
                }
                methods = {
                    name: watched(name, f)
                    for name in asked - {"__init__"}
                    if isinstance(f := inspect.getattr_static(thing, name, None), types.FunctionType)
                }
                thing = type(thing)(thing.__name__, (thing,), methods)  # an Enum has no heirs
            elif callable(thing):
                thing = watched(exercise.symbol, thing)
            run_probe(probe, thing)
    except KeyboardInterrupt:
        raise
    except BaseException:
        pass  # who gave None until then is known
    return names

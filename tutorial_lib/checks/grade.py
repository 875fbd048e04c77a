"""Judge what a learner's object answers to an exercise's probes, and say what happened in one sentence."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tutorial_lib.checks.answers import Answers, Here, asked_of, gave_none, run_probe
from tutorial_lib.checks.guard import explain_crash, guarded
from tutorial_lib.checks.probes import brief
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe, same_value

__all__ = ["Result", "Status", "grade", "judge"]

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


def grade(exercise: Exercise, learner: Any, seconds: float = 20.0) -> Result:
    """Grade an object of this process."""
    return judge(exercise, Here(exercise.probes, exercise.symbol, asked_of(exercise), learner), seconds)


@torch.enable_grad()  # whatever the learner's code switches, the caller's setting comes back
def judge(exercise: Exercise, answers: Answers, seconds: float) -> Result:
    """Ask the probes in order and stop at the first that does not pass."""
    result = Result(exercise.id, exercise.symbol, "passed", look_again=exercise.look_again)
    result.probes = {probe.name: "not run" for probe in exercise.probes}
    for number, probe in enumerate(exercise.probes):
        expected = run_probe(probe, exercise.reference)
        answer = answers.to(number, seconds)
        if answer.status == "not started":
            result.status, result.probes = "not started", {p.name: "not run" for p in exercise.probes}
            result.sentence = "the stub is still there: replace the line `raise NotImplementedError`"
            return result
        failure = Failure(answer.left_behind) if answer.left_behind else None
        if answer.status == "given" and failure is None:
            try:
                with guarded(seconds):
                    failure = probe.judge(answer.value, expected)
            except Exception as error:  # what came back is nothing that the judge can look into
                answer.status, answer.sentence = "crashed", explain_crash(error, seconds)
                answer.details, answer.met_none = traceback.format_exc(), "NoneType" in str(error)
        if answer.status == "crashed":
            result.status, result.probes[probe.name] = "crashed", "failed"
            forgotten = _nothing_returned(exercise, answers, number) if answer.met_none else ""
            result.sentence = forgotten or answer.left_behind or answer.sentence
            result.details = answer.details
            return result
        if failure is not None:
            result.status, result.probes[probe.name] = "wrong", "failed"
            result.sentence = _nothing_returned(exercise, answers, number)
            if not result.sentence:
                _describe(result, exercise, probe, failure)
                if found := diagnose(exercise, answers, number, answer.value, expected):
                    result.diagnosis, result.explanation = found.name, found.sentence
            return result
        result.probes[probe.name] = "passed"
    return result


def _describe(result: Result, exercise: Exercise, probe: Probe, failure: Failure) -> None:
    result.sentence = failure.sentence
    if probe.given is not None:
        result.table["input"] = probe.given if isinstance(probe.given, str) else brief(probe.given)
    result.table.update(failure.table)


def diagnose(
    exercise: Exercise, answers: Answers, number: int, yours: Any, expected: Any
) -> Misconception | None:
    """The misconception that gives the learner's numbers on the failed probe, and on all others too.

    Only a match in value counts, of a misconception that passes what the learner's code has passed. Where
    several match on this probe, the others decide; then the first.
    """
    probe, passed = exercise.probes[number], exercise.probes[:number]
    matching = [
        m
        for m in exercise.misconceptions
        if _gives(m, probe, yours)
        and not _gives(m, probe, expected)
        and all(_passes(m, other, run_probe(other, exercise.reference)) for other in passed)
    ]
    for other, probe in enumerate(exercise.probes):
        if len(matching) < 2:
            break
        answer = answers.to(other, 5.0)
        if answer.status == "given":
            matching = [m for m in matching if _gives(m, probe, answer.value)] or matching
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


def _nothing_returned(exercise: Exercise, answers: Answers, number: int) -> str:
    """The sentence on a forgotten `return`: if something of the learner's gave None that should not, else ""."""
    names = answers.forgot(number)
    if not names:
        return ""
    probe, reference = exercise.probes[number], exercise.reference
    fine = gave_none(probe, reference, exercise.symbol, asked_of(exercise), errors_count=True)
    guilty = [name for name in names if name not in fine]
    return f"`{guilty[-1]}` returned None: is a `return` missing?" if guilty else ""

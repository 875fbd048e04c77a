"""A learner's object answers an exercise's probes; what it says is plain data, whoever judges it and where.

`Here` asks an object in this process: `check()` in a notebook, and the far end of `apart.Apart`, which asks one in
a process of its own.
"""

from __future__ import annotations

import functools
import inspect
import random
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tutorial_lib.checks.guard import explain_crash, guarded
from tutorial_lib.checks.plain import plain, readable
from tutorial_lib.checks.spec import Exercise, Probe

__all__ = ["Answer", "Answers", "Here", "asked_of", "gave_none", "run_probe"]

GRADIENTS_OFF = (
    "gradients are still switched off when your code is done, so nothing that runs after it can be trained: "
    "`with torch.no_grad():` switches them on again at its end"
)


@dataclass
class Answer:
    """What came of one probe."""

    status: str
    """ "given", "crashed" or "not started"."""
    value: Any = None
    """Plain data, if it was given."""
    sentence: str = ""
    """Why it crashed."""
    details: str = ""
    """The traceback."""
    left_behind: str = ""
    """A switch of torch's, for the whole process, that learner code has turned and not turned back."""
    met_none: bool = False
    """Whether it crashed because something was None."""


class Answers(Protocol):
    """Something that can be asked an exercise's probes, by their number."""

    def to(self, number: int, seconds: float) -> Answer:
        """What the learner's object says to a probe."""

    def forgot(self, number: int) -> list[str]:
        """Its functions that return None in a probe, though their signatures allow none; the last one last."""


def run_probe(probe: Probe, thing: Any) -> Any:
    """One probe, from the same random state each time; the result as plain data."""
    random.seed(0)
    np.random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return plain(probe.run(thing))


class Here:
    """Answers of an object in this process."""

    def __init__(self, probes: Sequence[Probe], symbol: str, asked: frozenset[str], learner: Any) -> None:
        self.probes, self.symbol, self.asked, self.learner = probes, symbol, asked, learner

    def to(self, number: int, seconds: float) -> Answer:
        """Runs the probe; only Ctrl-C goes through."""
        try:
            with guarded(seconds):
                value = run_probe(self.probes[number], self.learner)
            return Answer("given", value, left_behind=_left_behind())
        except NotImplementedError:
            return Answer("not started")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            sentence = explain_crash(error, seconds)
            met_none = isinstance(error, (TypeError, AttributeError)) and "NoneType" in sentence
            details = readable("".join(traceback.format_exception(error)))
            return Answer("crashed", None, sentence, details, _left_behind(), met_none)

    def forgot(self, number: int) -> list[str]:
        """Runs the probe once more, and watches."""
        names = gave_none(self.probes[number], self.learner, self.symbol, self.asked)
        return [name for name in names if not self._may(name)]

    def _may(self, name: str) -> bool:
        signature = getattr(getattr(self.learner, name, self.learner), "__annotations__", {})
        return any(word in str(signature.get("return", "")) for word in ("None", "Optional"))


def _left_behind() -> str:
    left = "" if torch.is_grad_enabled() else GRADIENTS_OFF
    torch.set_grad_enabled(True)
    return left


def asked_of(exercise: Exercise) -> frozenset[str]:
    """The methods that the exercise asks for, if it asks for a class."""
    if not isinstance(exercise.reference, type):
        return frozenset()
    mine = [c for c in exercise.reference.__mro__ if c not in nn.Module.__mro__]
    return frozenset(name for c in mine for name in vars(c)) - {"__init__"}


def gave_none(
    probe: Probe, thing: Any, symbol: str, asked: frozenset[str], errors_count: bool = False
) -> list[str]:
    """Who returns None in this probe: the function, or methods of the class that the exercise asks for.

    Args:
        errors_count: Of a reference: where an error is right, None is no forgotten `return`.
    """
    names: list[str] = []

    def watched(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = function(*args, **kwargs)
            except Exception:
                if errors_count:
                    names.append(name)
                raise
            if result is None:
                names.append(name)
            return result

        return call

    try:
        with guarded(5.0):
            if isinstance(thing, type):
                methods = {
                    name: watched(name, f)
                    for name in asked
                    if isinstance(f := inspect.getattr_static(thing, name, None), types.FunctionType)
                }
                thing = type(thing)(thing.__name__, (thing,), methods)  # an Enum has no heirs
            elif callable(thing):
                thing = watched(symbol, thing)
            run_probe(probe, thing)
    except KeyboardInterrupt:
        raise
    except BaseException:
        pass  # who gave None until then is known
    return names

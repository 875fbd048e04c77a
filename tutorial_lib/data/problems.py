"""A small world of problems, each with one right answer: what Parts 6 to 9 teach, reward and measure.

    Problem("reverse", 1, "Reverse: lord", "drol")

A problem is made of operands, words or numbers, and the operands decide on which side of the split it falls: a word that
is held out stands in no training problem of any task, and neither does a sum in the other order. So what is measured on
the held-out side cannot have been learned by heart.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from tutorial_lib.data.corpora import load_text
from tutorial_lib.data.splits import key_fraction

__all__ = [
    "HELD_OUT",
    "LEVELS",
    "SPLITS",
    "TASKS",
    "Problem",
    "Task",
    "draw",
    "is_held_out",
    "is_right",
    "words",
]

LEVELS = (1, 2, 3)
"""How hard: words of 3 and 4, of 5 and 6, of 7 to 9 letters; numbers of so many digits."""

SPLITS = ("train", "held_out")

HELD_OUT = 0.1
"""The share of all operands that no training problem has."""

_LETTERS = {1: (3, 4), 2: (5, 6), 3: (7, 9)}


@dataclass(frozen=True)
class Problem:
    """A question with one right answer."""

    task: str
    """The name of its task in `TASKS`."""
    level: int
    """How hard it is, 1 to 3."""
    prompt: str
    """What is asked."""
    answer: str
    """The right answer, to the letter."""

    def messages(self) -> list[dict[str, str]]:
        """Question and answer, as a conversation."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def is_right(problem: Problem, answer: str) -> bool:
    """Whether this is the answer, and nothing else is: only blanks around it are forgiven."""
    return answer.strip() == problem.answer


@dataclass(frozen=True)
class Task:
    """A sort of problem."""

    ask: str
    """The question, with a place `{}` for each operand."""
    solve: Callable[..., str]
    """The answer to these operands."""
    operands: Callable[[random.Random, int, Mapping[int, Sequence[str]]], tuple[str, ...]] = field(
        default=lambda rng, level, words: (rng.choice(words[level]),)
    )
    """Draws them, for a level."""
    split_by: Callable[..., str] = field(default=lambda word, *_: word)
    """Which of the operands, as a text, say whether a problem is held out."""


def is_held_out(operands: str) -> bool:
    """Whether problems with these operands are for measuring alone: the same on every machine, with every seed."""
    return key_fraction(operands, salt="problems") < HELD_OUT


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _two_numbers(rng: random.Random, level: int, words: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    return str(_number(rng, level)), str(_number(rng, level))


def _word_and_letter(rng: random.Random, level: int, words: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    word = rng.choice(words[level])
    # Half of the time a letter that is in it, or nearly every answer would be 0.
    return word, rng.choice(word) if rng.random() < 0.5 else rng.choice("abcdefghijklmnopqrstuvwxyz")


def _word_and_shift(rng: random.Random, level: int, words: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    return rng.choice(words[level]), str(rng.randint(1, 3))


def _caesar(word: str, shift: str) -> str:
    return "".join(chr((ord(letter) - ord("a") + int(shift)) % 26 + ord("a")) for letter in word)


def _pair(a: str, b: str) -> str:
    return " ".join(sorted((a, b)))  # 7 + 5 is no news to whoever has learned 5 + 7


_NUMBERS = {"operands": _two_numbers, "split_by": _pair}

TASKS: dict[str, Task] = {
    "repeat": Task("Repeat: {}", lambda word: word),
    "upper": Task("Upper-case: {}", str.upper),
    "first": Task("First letter: {}", lambda word: word[0]),
    "last": Task("Last letter: {}", lambda word: word[-1]),
    "reverse": Task("Reverse: {}", lambda word: word[::-1]),
    "sort": Task("Sort the letters: {}", lambda word: "".join(sorted(word))),
    "count": Task("Count in {}: {}", lambda word, letter: str(word.count(letter)), _word_and_letter),
    "shift": Task("Shift by {1}: {0}", _caesar, _word_and_shift),
    "larger": Task("Which is larger, {} or {}?", lambda a, b: str(max(int(a), int(b))), **_NUMBERS),
    "add": Task("Add: {} + {}", lambda a, b: str(int(a) + int(b)), **_NUMBERS),
    "subtract": Task("Subtract: {} - {}", lambda a, b: str(int(a) - int(b)), **_NUMBERS),
}
"""All tasks, by name. On words: the first eight; on numbers: the last three."""


@lru_cache(maxsize=1)
def words() -> dict[int, list[str]]:
    """The words of Shakespeare's plays that stand there twice at least, by level: real ones, 11,246 of them.

    Raises:
        CorpusError: if the plays cannot be had.
    """
    text = load_text("shakespeare").decode("utf-8")
    found = Counter(re.findall(r"(?<![\w'’])[a-z]+(?![\w'’])", text))
    often = sorted(word for word, n in found.items() if n >= 2)
    return {
        level: [word for word in often if low <= len(word) <= high] for level, (low, high) in _LETTERS.items()
    }


def draw(
    split: str,
    seed: int = 0,
    tasks: Sequence[str] | Mapping[str, float] = tuple(TASKS),
    levels: Sequence[int] | Mapping[int, float] = LEVELS,
    words: Callable[[], Mapping[int, Sequence[str]]] = words,
) -> Iterator[Problem]:
    """Problems without end, the same for the same seed.

    Args:
        split: `train`, or `held_out` for problems whose operands no training problem has.
        tasks: Their names, equally often; or how often each comes, in any unit.
        levels: How hard; likewise.
        words: The words of each level.

    Raises:
        ValueError: for an unknown split, task or level.
    """
    _known("split", [split], SPLITS)
    _known("task", tasks, TASKS)
    _known("level", levels, LEVELS)
    return _draw(
        split == "held_out", random.Random(f"{split} {seed}"), _weighted(tasks), _weighted(levels), words()
    )


def _draw(
    held_out: bool,
    rng: random.Random,
    tasks: tuple[list[str], list[float]],
    levels: tuple[list[int], list[float]],
    words: Mapping[int, Sequence[str]],
) -> Iterator[Problem]:
    while True:
        (name,), (level,) = (rng.choices(*weighted) for weighted in (tasks, levels))
        task = TASKS[name]
        while (
            True
        ):  # the task and the level stay: whichever share of them is held out, all come as often as asked
            operands = task.operands(rng, level, words)
            if is_held_out(task.split_by(*operands)) == held_out:
                break
        yield Problem(name, level, task.ask.format(*operands), task.solve(*operands))


def _weighted(choices: Sequence | Mapping) -> tuple[list, list[float]]:
    weights = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, 1.0)
    return list(weights), list(weights.values())


def _known(what: str, given: Sequence | Mapping, known: Sequence | Mapping) -> None:
    if not given:
        raise ValueError(f"no {what} is given: choose from {', '.join(map(str, known))}")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), map(str, known), n=1, cutoff=0.0)
            raise ValueError(
                f"there is no {what} {name!r}: did you mean {near[0]}? There are {', '.join(map(str, known))}"
                if near
                else f"there is no {what} {name!r}: there are {', '.join(map(str, known))}"
            )

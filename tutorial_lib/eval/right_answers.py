"""How many problems does a model solve? It is asked as in a chat, answers greedily, and is right to the letter or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tutorial_lib.data.problems import TASKS, Problem, draw, is_right
from tutorial_lib.interop.pretrained import Pretrained
from tutorial_lib.serve.respond import Request, complete

__all__ = ["Score", "ask", "held_out_problems", "score_by_task"]


@dataclass(frozen=True)
class Score:
    """Of n problems, so many were solved."""

    n: int
    right: int

    @property
    def share(self) -> float:
        """The share that was solved."""
        return self.right / self.n

    @property
    def error(self) -> float:
        """The standard error of the share, from n independent problems: √(p (1 − p) / n)."""
        return math.sqrt(self.share * (1 - self.share) / self.n)


def held_out_problems(n: int, seed: int = 0) -> list[Problem]:
    """So many different problems of each task, none of which anybody was trained on; fewer where there are no more."""
    found: list[Problem] = []
    for task in TASKS:
        seen: dict[str, Problem] = {}
        for problem in islice(draw("held_out", seed, [task]), 20 * n):
            seen.setdefault(problem.prompt, problem)
            if len(seen) == n:
                break
        found += seen.values()
    return found


def ask(
    found: Pretrained, questions: Sequence[str], max_new_tokens: int = 24, at_once: int = 64
) -> Iterator[str]:
    """What the model answers to each question, alone and greedily: the same at every call.

    Args:
        at_once: How many are answered together.
    """
    for start in range(0, len(questions), at_once):
        requests = []
        for question in questions[start : start + at_once]:
            ids = found.template.encode(found.tokenizer, [{"role": "user", "content": question}])
            requests.append(
                Request(ids, max_new_tokens, temperature=0.0, stop_ids=found.stop_ids, stop=found.stop)
            )
        for reply in complete(found.model, found.tokenizer, requests):
            yield reply.text


def score_by_task(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, Score]:
    """Each task's score, in the order in which the tasks come."""
    right: dict[str, list[bool]] = {}
    for problem, answer in zip(problems, answers, strict=True):
        right.setdefault(problem.task, []).append(is_right(problem, answer))
    return {task: Score(len(each), sum(each)) for task, each in right.items()}

"""A world whose answers are right, whose sides never meet, and which is the same for everybody."""

from __future__ import annotations

from itertools import islice

import pytest

from tutorial_lib.data.problems import HELD_OUT, LEVELS, TASKS, Problem, draw, is_held_out, is_right, words


def some(split: str, n: int, *args, **how) -> list[Problem]:
    return list(islice(draw(split, *args, **how), n))


ANSWERS = {
    "repeat": ("Repeat: lord", "lord"),
    "upper": ("Upper-case: lord", "LORD"),
    "first": ("First letter: lord", "l"),
    "last": ("Last letter: lord", "d"),
    "reverse": ("Reverse: lord", "drol"),
    "sort": ("Sort the letters: lord", "dlor"),
    "count": ("Count in lord: o", "1"),
    "shift": ("Shift by 3: lozy", "orcb"),
    "larger": ("Which is larger, 9 or 10?", "10"),
    "add": ("Add: 95 + 7", "102"),
    "subtract": ("Subtract: 7 - 12", "-5"),
}


def test_every_task_has_an_answer_that_can_be_checked_by_hand():
    operands = {"count": ("lord", "o"), "shift": ("lozy", "3"), "larger": ("9", "10"), "add": ("95", "7")}
    operands["subtract"] = ("7", "12")
    for name, task in TASKS.items():
        given = operands.get(name, ("lord",))
        assert (task.ask.format(*given), task.solve(*given)) == ANSWERS[name]


def test_no_operand_is_on_both_sides():
    """Not only the prompts differ: no word that is asked about in one is in the other, in any task, nor a sum turned round."""
    seen: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        seen[split] = set()
        for problem in some(split, 6000):
            asked = problem.prompt.partition(":")[2] if ":" in problem.prompt else problem.prompt
            if problem.task == "count":
                asked = problem.prompt.split()[2].rstrip(":")
            if problem.task in ("larger", "add", "subtract"):
                numbers = [word.strip("?,") for word in problem.prompt.split() if word.strip("?,").isdigit()]
                asked = " ".join(sorted(numbers))
            seen[split].add(asked.strip())
    assert len(seen["train"]) > 3000 and len(seen["held_out"]) > 500
    assert not seen["train"] & seen["held_out"]


def test_the_same_seed_draws_the_same_and_another_does_not():
    assert some("train", 50, 3) == some("train", 50, 3)
    assert some("train", 50, 3) != some("train", 50, 4)
    assert some("train", 50, 3) != some("held_out", 50, 3)


def test_the_share_of_what_is_held_out():
    share = sum(is_held_out(f"word{i}") for i in range(20_000)) / 20_000
    assert abs(share - HELD_OUT) < 0.01


def test_tasks_and_levels_come_as_often_as_asked():
    found = some("train", 4000, 0, {"reverse": 3, "add": 1}, {1: 1, 3: 1})
    assert {problem.task for problem in found} == {"reverse", "add"}
    assert abs(sum(problem.task == "reverse" for problem in found) / 4000 - 0.75) < 0.05
    assert {problem.level for problem in found} == {1, 3}
    for problem in found:
        if problem.task == "reverse":
            assert (len(problem.answer) in (3, 4)) == (problem.level == 1)


def test_all_levels_of_all_tasks_can_be_drawn_on_both_sides():
    for split in ("train", "held_out"):
        for name in TASKS:
            for level in LEVELS:
                (problem,) = some(split, 1, 0, [name], [level])
                assert (problem.task, problem.level) == (name, level)


def test_words_of_ones_own():
    mine = {1: ["abc", "abd", "abe", "abf"], 2: [], 3: []}
    found = some("train", 20, 0, ["upper"], [1], words=lambda: mine)
    assert {problem.answer for problem in found} <= {"ABC", "ABD", "ABE", "ABF"}


def test_the_words_are_shakespeares():
    found = words()
    assert [len(found[level]) for level in LEVELS] == [1718, 4171, 5357]
    assert "lord" in found[1] and "crown" in found[2] and "husband" in found[3]


def test_an_answer_is_right_to_the_letter():
    problem = Problem("upper", 1, "Upper-case: lord", "LORD")
    assert is_right(problem, "LORD") and is_right(problem, " LORD\n")
    for wrong in ("lord", "LORD.", "The answer is LORD", "LORDLORD", ""):
        assert not is_right(problem, wrong)
    assert problem.messages()[1] == {"role": "assistant", "content": "LORD"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: draw("test"), "there is no split 'test': did you mean"),
        (lambda: draw("train", 0, ["revers"]), "there is no task 'revers': did you mean reverse"),
        (lambda: draw("train", 0, list(TASKS), [4]), "there is no level 4"),
        (lambda: draw("train", 0, []), "no task is given"),
    ],
)
def test_what_is_unknown_is_a_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call()

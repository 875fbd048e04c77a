"""From a conversation to ids and to what of them is learned: what the assistant says, its end, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.serve.template import ChatTemplate, Message, TemplateProblem

__all__ = ["Example", "cut_to", "encode_example"]


@dataclass(frozen=True)
class Example:
    """A conversation in ids."""

    ids: tuple[int, ...]
    """All of it."""
    learned: tuple[bool, ...]
    """Of each id: whether the model is to learn to write it."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_learned(self) -> int:
        """How many ids are learned. The first of a row cannot be: nothing stands before it."""
        return sum(self.learned[1:])


def encode_example(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """A conversation as the template writes it, with every answer marked, from its first token to its end token.

    An answer is found by comparing: what the template writes up to "now the assistant answers", and what it writes when
    the answer is there. What follows the end token (a line break, with ChatML) is not learned: whoever generates has
    stopped by then.

    Raises:
        TemplateProblem: if the template does not take the messages, or writes what was said differently afterwards, so
            that no answer can be found in it.
    """
    ids = template.encode(tokenizer, messages, answer_next=False)
    learned = [False] * len(ids)
    specials = set(tokenizer.specials.values())
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.encode(tokenizer, messages[:turn], answer_next=True)
        whole = turn + 1 == len(messages)
        after = ids if whole else template.encode(tokenizer, messages[: turn + 1], answer_next=False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise TemplateProblem(
                f"the chat template writes turn {turn + 1} differently when more was said (or announces an answer that it "
                "does not write), so what is to be learned cannot be found"
            )
        ends = [at + 1 for at in range(len(before), len(after)) if after[at] in specials]
        end = ends[-1] if ends else len(after)
        learned[len(before) : end] = [True] * (end - len(before))
    return Example(tuple(ids), tuple(learned))


def cut_to(example: Example, length: int) -> Example:
    """The example, so long at most. What is too long loses its beginning, so that the end token is learned.

    (The first ids of a conversation are the system's and the oldest question. Whoever cuts the end off instead teaches
    that answers have none.)
    """
    return Example(example.ids[-length:], example.learned[-length:]) if len(example) > length else example

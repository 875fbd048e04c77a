"""A conversation: who said what, written down as the model knows it, and never longer than it can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from torch import nn

from tutorial_lib.core.kv_cache import EMPTY, KVCache
from tutorial_lib.core.model import Transformer
from tutorial_lib.core.rolling_cache import RollingKVCache
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.serve.respond import Request, respond
from tutorial_lib.serve.template import ChatTemplate, Message

__all__ = ["Conversation"]

SMALLEST = 1024
"""Tokens that a cache has room for at first; when a conversation outgrows it, twice as many are read into a new one."""


class Conversation:
    """Keeps the messages, and the keys and values of all that was read, so that nothing is read twice.

    Args:
        model: What answers.
        tokenizer: Its tokenizer.
        template: How it was taught to chat.
        how: Temperature and the rest for every answer; its ids are not looked at.
        context: The most tokens, question and answer together; what the model was trained on when None. When the
            conversation outgrows it, the oldest turns are forgotten; what the system said is not.
        system: What the model is told before everything else.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        how: Request,
        context: int | None = None,
        system: str | None = None,
    ) -> None:
        longest = model.config.max_seq_len
        if context is not None and not 2 <= context <= longest:
            raise ValueError(
                f"the context is {context:,} tokens, but must be between 2 and the {longest:,} that the model reads"
            )
        self.model, self.tokenizer, self.template, self.how = model, tokenizer, template, how
        self.context, self.system = context or longest, system
        self.messages: list[Message] = []
        self.forgotten = 0
        """How many messages were left out for want of room."""
        self.used = 0
        """Tokens that the last question took, with all that was read before it, and its answer."""
        self._cache: list[KVCache] | None = None
        self._size = 0  # tokens that the cache has room for
        self._rolling = False
        self._held: list[int] = []
        """What the cache holds for sure, in every layer."""

    def reset(self) -> None:
        """Begin anew."""
        self.messages, self.forgotten, self.used = [], 0, 0

    def ask(self, text: str) -> Iterator[str]:
        """Say something; gives the answer piece by piece. If it is interrupted, what was said so far stays said, and
        a question without a word of an answer was not asked.

        Raises:
            ValueError: if the message alone does not fit; then it was not said.
            TemplateProblem: if the template does not take it; likewise.
        """
        question: Message = {"role": "user", "content": text}
        answer: Message = {"role": "assistant", "content": ""}
        before = len(self.messages), self.forgotten, self.used
        try:
            ids, self.forgotten = self._fit(question)
            self.messages += [question, answer]  # both at once: whenever Ctrl-C comes, they take turns
            self.used = len(ids)
            room = min(self.how.max_new_tokens, self.context - len(ids))
            cache = self._prepare(ids, len(ids) + room)
            request = replace(self.how, ids=ids, max_new_tokens=room)
            with closing(respond(self.model, self.tokenizer, [request], cache)) as steps:
                while True:
                    try:
                        _, piece = next(steps)
                    except StopIteration as end:
                        (reply,) = end.value
                        break
                    if not self._rolling:
                        self._held = ids  # the prompt was read; how much of the answer was, is not known yet
                    answer["content"] += piece
                    yield piece
        except BaseException:
            if not answer["content"]:
                said, self.forgotten, self.used = before
                del self.messages[said:]
            raise
        self.used += len(reply.ids)
        if cache is not None:
            self._held = (ids + reply.ids)[: cache[0].length]

    def _fit(self, question: Message) -> tuple[list[int], int]:
        """The conversation as ids, short enough that an answer has room; and how many messages are left out."""
        room = min(self.how.max_new_tokens, self.context // 2)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        forgotten, most = self.forgotten, self.context
        while True:
            ids = self.template.encode(self.tokenizer, [*system, *self.messages[forgotten:], question])
            last = forgotten >= len(self.messages)
            if len(ids) + room <= (self.context if last else most):
                return ids, forgotten
            most = self.context * 3 // 4  # all that stays will be read anew: let it be for several turns
            if last:
                raise ValueError(
                    f"the message has {len(ids):,} tokens with what surrounds it, but only "
                    f"{self.context - room:,} of {self.context:,} are left beside the answer's {room:,}"
                )
            forgotten += 2  # a question and its answer

    def _prepare(self, ids: list[int], size: int) -> list[KVCache] | None:
        """A cache with room for `size` tokens, holding as much of `ids` as it can, but not the last."""
        if not isinstance(self.model, Transformer):
            return None
        if self._cache is None or self._size < size:  # a whole context may take more memory than the model
            self._held = []
            self._size = min(self.context, max(SMALLEST, 1 << (size - 1).bit_length()))
            self._cache = self.model.new_cache(1, self._size)
            self._rolling = any(isinstance(layer, RollingKVCache) for layer in self._cache)
        same = 0
        for old, new in zip(self._held, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        if self._rolling and same < len(self._held):
            same = 0  # what a ring has lost cannot come back
        # Should the answer be interrupted, in the middle of a layer even, only this is sure. A ring is overwritten.
        self._held = [] if self._rolling else ids[:same]
        for layer in self._cache:
            layer.positions[:, same:] = EMPTY
            layer.length = same
        return self._cache

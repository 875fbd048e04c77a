"""A conversation: who said what, written down as the model knows it, and never longer than it can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from tutorial_lib.core.kv_cache import EMPTY, KVCache
from tutorial_lib.core.model import Transformer
from tutorial_lib.core.rolling_cache import RollingKVCache
from tutorial_lib.data.protocol import Tokenizer
from tutorial_lib.serve.respond import Reply, Request, respond
from tutorial_lib.serve.template import ChatTemplate, Message

__all__ = ["Conversation"]


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
                f"a context of {context} tokens does not fit the model: it was trained on {longest:,}"
            )
        self.model, self.tokenizer, self.template, self.how = model, tokenizer, template, how
        self.context, self.system = context or longest, system
        self.messages: list[Message] = []
        self.forgotten = 0
        """How many messages were left out for want of room."""
        self.held: list[int] = []
        """The tokens that the cache holds."""
        self._cache: list[KVCache] | None = None

    def reset(self) -> None:
        """Begin anew."""
        self.messages, self.forgotten = [], 0

    def ask(self, text: str) -> Iterator[str]:
        """Say something; gives the answer piece by piece. If it is interrupted, what was said so far stays said.

        Raises:
            ValueError: if the message alone does not fit.
            TemplateProblem: if the template does not take it.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fit()
        except ValueError:
            self.messages.pop()
            raise
        room = min(self.how.max_new_tokens, self.context - len(ids))
        cache = self._prepare(ids)
        said: list[str] = []
        reply: Reply | None = None
        steps = respond(self.model, self.tokenizer, [replace(self.how, ids=ids, max_new_tokens=room)], cache)
        try:
            while True:
                try:
                    _, piece = next(steps)
                except StopIteration as end:
                    reply = end.value[0]
                    break
                said.append(piece)
                yield piece
        finally:
            steps.close()
            self.messages.append({"role": "assistant", "content": "".join(said)})
            # Interrupted in the middle of a step, some layers may hold one token more than others.
            self.held = ids + (reply.ids[:-1] if reply else [])
            if cache is not None:
                self._rewind(min([len(self.held), *(layer.length for layer in cache)]))

    def _fit(self) -> list[int]:
        """The conversation as ids, short enough that an answer has room."""
        room = min(self.how.max_new_tokens, self.context // 2)
        while True:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            kept = self.messages[self.forgotten :]
            ids = self.template.encode(self.tokenizer, [*system, *kept])
            if len(ids) + room <= self.context:
                return ids
            if len(kept) == 1:
                raise ValueError(
                    f"the message has {len(ids):,} tokens with what surrounds it, but only "
                    f"{self.context - room:,} of {self.context:,} are left beside the answer's {room:,}"
                )
            self.forgotten += 2  # a question and its answer

    def _prepare(self, ids: list[int]) -> list[KVCache] | None:
        """The cache, holding as much of `ids` as it can, but not the last."""
        if not isinstance(self.model, Transformer):
            return None
        if self._cache is None:
            self._cache = self.model.new_cache(1, self.context)
        same = 0
        for old, new in zip(self.held, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        self._rewind(same)
        return self._cache

    def _rewind(self, length: int) -> None:
        """Let the cache forget what comes after so many tokens; all of it, if it cannot do that."""
        assert self._cache is not None
        if any(layer.length != length for layer in self._cache):
            if any(isinstance(layer, RollingKVCache) for layer in self._cache):
                length = 0  # what the ring has lost cannot come back
            for layer in self._cache:
                if length == 0:
                    layer.reset()
                layer.positions[:, length:] = EMPTY
                layer.length = length
        self.held = self.held[:length]

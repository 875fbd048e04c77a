"""A conversation: its cache, its forgetting and its interruptions never change what is said next."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tutorial_lib
from tutorial_lib.checks.probes import fill_by_name
from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.quant.int8 import to_int8
from tutorial_lib.serve.conversation import Conversation
from tutorial_lib.serve.respond import Request, complete
from tutorial_lib.serve.template import ChatTemplate, TemplateProblem

BYTES = ByteTokenizer(["<|eos|>", "<|begin|>", "<|end|>"])
CHAT = ChatTemplate(
    "{% for m in messages %}<|begin|>{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>a:{% endif %}"
)
HOW = Request([0], 12, temperature=0, stop_ids=frozenset([258]))
QUESTIONS = ("hello", "and who are you? <|end|>", "é€", "what was that", "well", "so long")


def build(clean: bool = True, **changes) -> Transformer:
    """A random model that answers in ASCII, so that what it wrote is read again as it was written; or does not."""
    shape = {"max_seq_len": 320, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2} | changes
    model = fill_by_name(Transformer(ModelConfig(259, tie_embeddings=False, **shape)), 0.2).double().eval()
    if clean:
        model.head.weight.data[128:258] = 0
    return model


MODELS = {
    "llama": build,
    "llama, half characters": lambda: build(clean=False),
    "gpt2": lambda: build(rope=False, norm="layernorm", mlp="gelu", bias=True),
    "rings": lambda: build(window=10),
    "rings with sinks, and a layer that sees all": lambda: build(window=(10, None), sinks=3),
    "int8": lambda: to_int8(build().float()),
    "GPT": lambda: fill_by_name(GPT(GPTConfig(259, 320, 32, 4, 2, tie_embeddings=False)), 0.2).double(),
}
each_model = pytest.mark.parametrize("model", MODELS)


def talk_to(model: nn.Module, how: Request = HOW, **changes) -> Conversation:
    return Conversation(model, BYTES, CHAT, how, **changes)


def ask(talk: Conversation, text: str) -> str:
    """The answer, which has to be what the model says to the whole conversation, read from its beginning."""
    answer = "".join(talk.ask(text))
    *before, question, said = talk.messages
    assert question == {"role": "user", "content": text} and said == {"role": "assistant", "content": answer}
    system = [] if talk.system is None else [{"role": "system", "content": talk.system}]
    ids = CHAT.encode(BYTES, [*system, *before[talk.forgotten :], question])
    room = min(talk.how.max_new_tokens, talk.context - len(ids))
    (reply,) = complete(talk.model, BYTES, [replace(talk.how, ids=ids, max_new_tokens=room)])
    assert answer == reply.text
    assert talk.used == len(ids) + len(reply.ids) <= talk.context
    return answer


def taking_turns(talk: Conversation) -> bool:
    return [m["role"] for m in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)


# ── The cache ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "system"), [*zip(MODELS, [None, "be brief"] * 4, strict=False), ("llama", "be brief")]
)
def test_the_cache_never_changes_an_answer(model, system):
    talk = talk_to(MODELS[model](), system=system)
    answers = [ask(talk, question) for question in QUESTIONS[:3]]
    assert talk.forgotten == 0 and (len(set(answers)) > 1 or model == "GPT")


def test_drawn_answers_with_a_seed():
    talk = talk_to(build(), replace(HOW, temperature=0.9, top_p=0.9, penalty=1.2, seed=4))
    first = [ask(talk, question) for question in QUESTIONS[:3]]
    talk.reset()
    assert first == [ask(talk, question) for question in QUESTIONS[:3]]


def test_nothing_is_read_twice():
    model = build()
    read: list[int] = []
    model.tokens.register_forward_hook(lambda _, ids, out: read.append(ids[0].shape[1]))
    talk = talk_to(model)
    for question in QUESTIONS[:3]:
        before, read[:] = talk.used, []
        "".join(talk.ask(question))
        assert sum(read) == talk.used - before - (before == 0), (
            "but for the last token, which was not read before"
        )


def test_other_settings_in_the_middle():
    talk = talk_to(build())
    ask(talk, "hello")
    talk.how = replace(talk.how, temperature=0.8, seed=1, max_new_tokens=9)
    ask(talk, "bolder")
    talk.system = "be brief"
    ask(talk, "again")
    talk.system = None
    ask(talk, "and again")


# ── Interruptions ────────────────────────────────────────────────────────────────────────────────────────


@each_model
def test_an_answer_that_was_cut_short_stays_as_far_as_it_was_said(model):
    talk = talk_to(MODELS[model]())
    ask(talk, "hello")
    for n in (1, 4, 0):
        answer, said = talk.ask(f"stop after {n}"), ""
        for _ in range(n):
            said += next(answer)
        answer.close()
        if n:  # else it was never begun
            assert talk.messages[-2:] == [
                {"role": "user", "content": f"stop after {n}"},
                {"role": "assistant", "content": said},
            ]
        ask(talk, "go on")
    assert taking_turns(talk) and len(talk.messages) == 2 + 2 * 3 + 2 * 2


@pytest.mark.parametrize("model", ["llama", "rings with sinks, and a layer that sees all"])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("layer", [0, 1])
def test_ctrl_c_between_two_layers(model, step, layer):
    model, calls = MODELS[model](), []

    def interrupt(*_):
        calls.append(layer)
        if len(calls) == step + 1:
            raise KeyboardInterrupt

    talk = talk_to(model.train())
    ask(talk, "hello")
    hook = model.blocks[layer].attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("how are you?"))
    hook.remove()
    assert model.training and taking_turns(talk)
    assert len(talk.messages) == (4 if step else 2), "a question without a word of an answer was not asked"
    ask(talk, "go on")
    ask(talk, "and on")


WATCHED = ("serve/conversation.py", "serve/respond.py", "core/kv_cache.py", "core/rolling_cache.py")


class CtrlC:
    """Raises KeyboardInterrupt before the n-th line that is run in the files that keep what was said and read."""

    def __init__(self, n: int) -> None:
        self.left, self.files = n, {str(Path(tutorial_lib.__file__).parent / name) for name in WATCHED}

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> CtrlC:
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(self.before)


@pytest.mark.parametrize("model", ["llama", "rings", "GPT"])
def test_ctrl_c_at_any_line(model):
    model = MODELS[model]()
    how = replace(HOW, max_new_tokens=4)
    lines = CtrlC(10**9)
    talk = talk_to(model, how)
    ask(talk, "hello")
    with lines:
        list(talk.ask("how are you?"))
    lines = 10**9 - lines.left
    assert lines > 100
    generator = torch.Generator().manual_seed(0)
    moments = torch.randperm(lines, generator=generator)[:18].tolist()
    talk = talk_to(model, how, system="be brief")
    for n in moments:
        if len(talk.messages) > 6:
            talk.reset()
        try:
            with CtrlC(n + 1):
                for _ in talk.ask("how are you?"):
                    pass
        except KeyboardInterrupt:
            pass
        assert taking_turns(talk), f"line {n + 1} of {lines}"
        model.eval()  # Ctrl-C can come before the mode is given back; that is not what is asked here
        ask(talk, "go on")


def test_a_question_that_was_not_asked_makes_nothing_forgotten():
    model = build()
    talk = talk_to(model, context=120)
    ask(talk, "hello")
    ask(talk, "again")
    before = list(talk.messages), talk.forgotten, talk.used

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.blocks[0].attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("a long question, for which all that was said before has to go"))
    hook.remove()
    assert (talk.messages, talk.forgotten, talk.used) == before
    ask(talk, "go on")


def test_ctrl_c_in_the_middle_of_writing_into_the_cache(monkeypatch):
    # Half of a layer's new keys are there, its length says nothing of them.
    for model in (build(), build(window=10)):
        talk = talk_to(model)
        ask(talk, "hello")
        kind = type(talk._cache[0])
        name = "append" if kind is KVCache else "_write"
        whole, calls = getattr(kind, name), []

        def broken(self, k, v, positions, calls=calls, whole=whole, name=name):
            calls.append(k.shape[2])
            if len(calls) > 2 and calls[-1] == 1:  # the first token after the prompt, in the first layer
                if name == "append":
                    self.keys[:, :, self.length] = 7.0
                    self.positions[:, self.length] = 0
                else:
                    self.keys[:, :, :3] = 7.0
                raise KeyboardInterrupt
            return whole(self, k, v, positions)

        monkeypatch.setattr(kind, name, broken)
        with pytest.raises(KeyboardInterrupt):
            list(talk.ask("how are you?"))
        monkeypatch.undo()
        ask(talk, "go on")


# ── Room ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "system"),
    [("llama", None), ("llama", "be brief"), ("rings", "be brief"), ("int8", None), ("GPT", "be brief")],
)
def test_what_does_not_fit_is_forgotten_by_whole_turns(model, system):
    talk, seen = talk_to(MODELS[model](), context=90, system=system), []
    for question in QUESTIONS:
        ask(talk, question)
        seen.append(talk.forgotten)
    assert seen == sorted(seen) and seen[0] == 0 < seen[-1] < len(talk.messages)
    assert not any(n % 2 for n in seen), "a question goes with its answer"
    assert taking_turns(talk) and len(talk.messages) == 12, "to be shown they are still there"


def test_a_question_may_take_all_but_the_room_for_an_answer():
    talk = talk_to(build(), context=60)
    around = len(CHAT.encode(BYTES, [{"role": "user", "content": ""}]))
    ask(talk, "hello")
    ask(talk, "x" * (60 - 12 - around))
    assert talk.forgotten == 2
    short = talk_to(build(), replace(HOW, max_new_tokens=500), context=60)  # an answer gets half at least
    ask(short, "y" * (30 - around))


@pytest.mark.parametrize("model", ["llama", "rings", "GPT"])
def test_a_message_that_is_too_long_was_not_said(model):
    talk, twin = talk_to(MODELS[model](), context=90), talk_to(MODELS[model](), context=90)
    for question in QUESTIONS[:2]:
        assert ask(talk, question) == ask(twin, question)
        before = list(talk.messages)
        with pytest.raises(
            ValueError, match="has 1,0.. tokens .* only 78 of 90 are left .* the answer's 12"
        ) as e:
            next(talk.ask("x" * 1000))
        assert "\n" not in str(e.value)
        assert (talk.messages, talk.forgotten) == (before, twin.forgotten)
    assert ask(talk, "well") == ask(twin, "well")


def test_a_message_that_the_template_refuses_was_not_said():
    refuses = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no!') }}{% endif %}" + CHAT.source
    talk = Conversation(build(), BYTES, ChatTemplate(refuses), HOW)
    ask(talk, "hello")
    with pytest.raises(TemplateProblem, match="no!"):
        next(talk.ask("bad"))
    with pytest.raises(ValueError, match="surrogates"):
        next(talk.ask("\ud800"))
    ask(talk, "good")
    assert len(talk.messages) == 4


@pytest.mark.parametrize("context", [0, 1, 321])
def test_a_context_that_the_model_does_not_have(context):
    with pytest.raises(ValueError, match=f"the context is {context} tokens, but must be between 2 and the "):
        talk_to(build(), context=context)


@pytest.mark.parametrize("model", ["llama", "rings", "GPT"])
def test_after_a_reset_it_begins_anew(model):
    talk = talk_to(MODELS[model](), context=90, system="be brief")
    first = ask(talk, "hello")
    for question in QUESTIONS[1:4]:
        ask(talk, question)
    talk.reset()
    assert (talk.messages, talk.forgotten, talk.used) == ([], 0, 0)
    assert ask(talk, "hello") == first

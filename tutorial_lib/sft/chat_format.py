"""How a model that cannot chat yet is to learn it: tokens for who speaks, a template, and rows for them in its tables."""

from __future__ import annotations

from dataclasses import replace

import torch

from tutorial_lib.core.model import Transformer
from tutorial_lib.data.adapters import HuggingFaceTokenizer, as_huggingface
from tutorial_lib.data.protocol import Tokenizer

__all__ = ["CHAT", "END", "ROLE_TOKENS", "grow_vocabulary", "with_roles"]

END = "<|end|>"
"""Ends what somebody says. A model that never learned it never stops."""

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", END)
"""One token for each role, with an id of its own: no text that a user types can be read as one."""

CHAT = """
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
""".strip()
"""The course's template: `<|user|>Reverse: lord<|end|><|assistant|>drol<|end|>`. Its marks around what the assistant says
are for `transformers`, which makes masks of them; ours need none."""


def with_roles(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer with `ROLE_TOKENS` after all that it has, and `END` for its end; every other id stays.

    Raises:
        ValueError: if it cannot be said in Hugging Face's words, in which it is saved.
    """
    before = as_huggingface(tokenizer)
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Theirs

    copy = Theirs.from_str(before.tokenizer.to_str())
    copy.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ROLE_TOKENS])
    return HuggingFaceTokenizer(copy, eos=END, bos=before.bos)


@torch.no_grad()
def grow_vocabulary(model: Transformer, vocab_size: int) -> Transformer:
    """The same model with rows for more tokens: the old ones score what they scored before.

    A new row is the mean of the old ones and a little noise, so that a new token begins as nothing in particular: neither
    likelier than all the others, as with zeros where most scores are negative, nor out of range.

    Returns:
        A new model, of the same kind and in the same mode; the old one is not changed.

    Raises:
        ValueError: if it has more rows already.
    """
    old = model.config.vocab_size
    if vocab_size < old:
        raise ValueError(
            f"the model has {old:,} rows, which {vocab_size:,} tokens do not fill: a vocabulary only grows"
        )
    bigger = type(model)(replace(model.config, vocab_size=vocab_size)).to(model.tokens.weight.device)
    bigger = bigger.to(model.tokens.weight.dtype)
    state = model.state_dict()
    for name in [name for name, table in bigger.state_dict().items() if state[name].shape != table.shape]:
        mean, spread = state[name].mean(dim=0), state[name].std(dim=0)
        noise = torch.randn(vocab_size - old, mean.numel(), dtype=torch.float32).to(mean)
        state[name] = torch.cat([state[name], mean + 0.1 * spread * noise])
    bigger.load_state_dict(state)
    return bigger.train(model.training)

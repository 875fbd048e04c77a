"""Which models there are: each kind with its name, its configuration and its class.

Checkpoints, configurations, the formats of others and the dry run ask here and nowhere else. A model with another head
or other layers is a kind of its own: a subclass, so that what it shares keeps its names (`blocks.*`) and optimizers,
checkpoints and int8 go on working.

    @dataclass(frozen=True)
    class ScorerConfig(ModelConfig): ...
    class Scorer(Transformer): ...
    register(ScorerConfig, Scorer, writes=False)

Names come from files of strangers; nothing that is not registered here is ever imported for one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.swiglu import gated_width
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.tools.accounting import ModelShape

__all__ = ["KINDS", "Kind", "grow", "kind_named", "kind_of", "register"]


@dataclass(frozen=True)
class Kind:
    """A family of models."""

    name: str
    """That of the class: in a configuration (`model.kind`) and in a checkpoint's header."""
    config: type[Any]
    """A dataclass of plain values, each with a default."""
    model: type[nn.Module]
    """Made from such a configuration alone, which it keeps as `config`."""
    shape: Callable[[Any], ModelShape] | None = None
    """What a configuration costs, for the dry run."""
    writes: bool = True
    """Whether it scores next tokens, so that text can be written with it."""

    def build(self, settings: Mapping[str, Any]) -> nn.Module:
        """A model with fresh weights."""
        return self.model(self.config(**settings))

    def outline(self, config: Any, most: int | None = None) -> nn.Module:
        """The model without its weights: every parameter has its shape, and none has memory, if it can be made so.

        Args:
            most: Give up when it makes more tensors than this: a configuration may claim any number of layers.

        Raises:
            ValueError: if it does.
        """
        try:
            with _Outline(most):
                return self.model(config)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            return self.model(config)  # its constructor looks at numbers


class _Outline(TorchFunctionMode):
    """New tensors have a shape and no memory, and nothing is drawn at random.

    `with torch.device("meta")` would do as much; but there RoPE's few numbers have no values either, and torch
    loads its compiler, for more than a second, to do without them.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most, self.made = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        if func in (torch.empty, torch.ones, torch.zeros, torch.randn):
            func = torch.empty  # of a shape alone, all are the same
            kwargs["device"] = "meta"
            self.made += 1
            if self.most is not None and self.made > self.most:
                raise ValueError(f"it claims more than {self.most:,} tensors, which is more than there are")
        if func in (torch.Tensor.mul, torch.Tensor.__mul__) and args[0].is_meta:
            return args[0]  # a table's scale; torch's own way loads the compiler, too
        return func(*args, **kwargs)


KINDS: dict[str, Kind] = {}
"""By name."""


def register(
    config: type[Any],
    model: type[nn.Module],
    shape: Callable[[Any], ModelShape] | None = None,
    writes: bool = True,
) -> Kind:
    """Make a kind known; fields as in `Kind`, the name is that of the class.

    Raises:
        ValueError: if another class has that name. (The same cell of a notebook, run again, takes its place.)
    """
    kind = Kind(model.__name__, config, model, shape, writes)
    known = KINDS.get(kind.name)
    if known is not None and _address(known.model) != _address(model):
        raise ValueError(
            f"there is a kind {kind.name} already, of {_address(known.model)}: give yours another name"
        )
    KINDS[kind.name] = kind
    return kind


def _address(model: type) -> str:
    return f"{model.__module__}.{model.__qualname__}"


def kind_named(name: str) -> Kind:
    """The kind with this name; a ValueError names the nearest one."""
    if not isinstance(name, str) or name not in KINDS:  # a file may say anything
        near = min(KINDS, key=lambda known: (known.lower() != str(name).lower(), -_alike(known, str(name))))
        raise ValueError(
            f"there is no kind of model {name!r:.60}: did you mean {near!r}? There are {', '.join(KINDS)}"
        )
    return KINDS[name]


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def kind_of(model: nn.Module) -> Kind:
    """The kind of this model, which its configuration can make again.

    Raises:
        ValueError: if it is of no kind that is known, or has other weights than its configuration speaks of.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"this is torch.compile's wrapper around a {type(model._orig_mod).__name__}: hand over the model itself"
        )
    name = type(model).__name__
    kind = KINDS.get(name)
    if kind is None or kind.model is not type(model):
        raise ValueError(
            f"a {name} is no kind of model that is known here ({', '.join(KINDS)}): "
            "make it known with tutorial_lib.kinds.register"
        )
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    wanted = {key: tensor.shape for key, tensor in kind.outline(model.config).state_dict().items()}
    for key in sorted(own.keys() ^ wanted.keys()) or [key for key in own if own[key] != wanted[key]]:
        raise ValueError(
            f"this {name} has other weights than its configuration makes ({key}): with layers of another sort, "
            "experts or int8 say, it is a kind of its own"
        )
    return kind


def grow(model: nn.Module, kind: Kind, **settings: Any) -> nn.Module:
    """A model of a kind that extends this one's, with its weights: a reward model from a language model, say.

    Args:
        kind: Of the new one; its configuration has the old one's fields.
        settings: Of the new one, where they differ or were not there.

    Raises:
        ValueError: if a weight of the old one has no place in the new one, or another shape there.
    """
    new = kind.build({**asdict(model.config), **settings})
    own = new.state_dict()
    for name, weight in model.state_dict().items():
        if name not in own or own[name].shape != weight.shape:
            found = f"has shape {tuple(own[name].shape)}" if name in own else "is not there"
            raise ValueError(
                f"a {kind.name} cannot take over {name} {tuple(weight.shape)} of a {type(model).__name__}: there it {found}"
            )
    new.load_state_dict(model.state_dict(), strict=False)  # what is new in it stays fresh
    return new


def _gpt_shape(config: GPTConfig) -> ModelShape:
    return ModelShape(
        config.vocab_size,
        config.d_model,
        config.n_layers,
        config.n_heads,
        d_mlp=config.d_mlp,
        tied=config.tie_embeddings,
        learned_positions=config.max_seq_len,
        bias=config.bias,
    )


def _transformer_shape(config: ModelConfig) -> ModelShape:
    learned = config.positions == "learned" or (config.positions is None and not config.rope)
    gated = config.mlp == "swiglu"
    return ModelShape(
        config.vocab_size,
        config.d_model,
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        config.d_head,
        gated_width(config.d_model) if gated and config.d_mlp is None else config.d_mlp,
        gated=gated,
        tied=config.tie_embeddings,
        learned_positions=config.max_seq_len if learned else 0,
        bias=config.bias,
        norm=config.norm,
        qk_norm=config.qk_norm,
    )


def _moe_shape(config: MoEConfig) -> ModelShape:
    return replace(
        _transformer_shape(config),
        n_experts=config.n_experts,
        experts_per_token=config.experts_per_token,
        n_shared_experts=config.n_shared_experts,
        d_expert=config.d_expert,
        n_moe_layers=sum(map(config.has_experts, range(config.n_layers))),
    )


register(GPTConfig, GPT, _gpt_shape)
register(ModelConfig, Transformer, _transformer_shape)
register(MoEConfig, MoETransformer, _moe_shape)

"""Exercises of lesson 3.7, real weights."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, randn, same_shape
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.core.rope import RotaryEmbedding, apply_rope, half_to_interleaved, interleaved_to_half

# --- 3.7.a --------------------------------------------------------------------------------------------------

SIZES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


def _dequantize(
    raw: Tensor,
    kind: str,
    *,
    signed: str = "b",
    halves: Callable[[bytes], list[int]] = lambda b: [x & 15 for x in b] + [x >> 4 for x in b],
    around: Callable[[int], int] = lambda q: q - 8,
    m_times_d: bool = False,
    rounded: Callable[[float], float] = float,
) -> Tensor:
    """The reference, block by block, and, by its last arguments, what people write in its place."""
    if kind not in SIZES:
        raise ValueError(kind)
    rows = []
    for row in raw.tolist():
        numbers: list[float] = []
        for at in range(0, len(row), SIZES[kind]):
            block = bytes(row[at : at + SIZES[kind]])
            (d,) = struct.unpack("<e", block[:2])
            if kind == "Q8_0":
                numbers += [rounded(d * q) for q in struct.unpack(f"32{signed}", block[2:])]
            elif kind == "Q4_0":
                numbers += [rounded(d * around(q)) for q in halves(block[2:])]
            else:
                (m,) = struct.unpack("<e", block[2:4])
                numbers += [
                    d * (q + m) if m_times_d else rounded(rounded(d * q) + m) for q in halves(block[4:])
                ]
        rows.append(numbers)
    return torch.tensor(rows, dtype=torch.float32)


def _decoder(**how: Any) -> Callable[[Tensor, str], Tensor]:
    return lambda raw, kind: _dequantize(raw, kind, **how)


def _to_fp16(x: float) -> float:
    return struct.unpack("<e", struct.pack("<e", x))[0]


def _in_turns(b: bytes) -> list[int]:
    return [half for x in b for half in (x & 15, x >> 4)]


def _blocks(kind: str, rows: int, n_blocks: int, seed: int = 0) -> Tensor:
    """Random blocks whose scales are ordinary numbers: uint8 `(rows, n_bytes)`."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (rows, n_blocks, SIZES[kind]), generator=generator, dtype=torch.uint8)
    scales = randn(rows, n_blocks, 2, seed=seed).half().contiguous().view(torch.uint8)  # (rows, n_blocks, 4)
    n = 4 if kind == "Q4_1" else 2
    raw[:, :, :n] = scales[:, :, :n]
    return raw.flatten(1)


def _one(start: str, *scales: float, rest: list[int]) -> Tensor:
    """One block: its scales, and its first bytes; the others are zero."""
    head = struct.pack(start, *scales)
    return torch.tensor([[*head, *rest]], dtype=torch.uint8)


def _by_hand(f: Callable, kind: str) -> Tensor:
    if kind == "Q8_0":
        return f(_one("<e", 0.5, rest=[1, 2, 255, 128] + [0] * 28), kind)[0, :6]
    rest = [0xA3, 0x0F] + [0x88] * 14
    scales = _one("<e", 0.5, rest=rest) if kind == "Q4_0" else _one("<ee", 0.5, -2.0, rest=rest)
    return f(scales, kind)[0, [0, 1, 2, 16, 17, 18]]


def _untouched(f: Callable) -> tuple[Tensor, ...]:
    kept = []
    for kind in SIZES:
        raw = _blocks(kind, 2, 2, seed=3)
        f(raw, kind)
        kept.append(raw)
    return tuple(kept)


DEQUANTIZE = Exercise(
    id="3.7.a",
    symbol="dequantize",
    reference=_dequantize,
    look_again="32 numbers in 20 bytes",
    equivalent_mutants={
        "`blocks[:, :, 2:4].view(torch.float16).float()` became `blocks[:, :, 2:4].view(torch.float16)`": (
            "added to fp32, fp16 becomes fp32"
        ),
    },
    probes=[
        Probe(
            "shape and dtype",
            lambda f: tuple(f(_blocks(kind, 3, 2), kind) for kind in SIZES),
            same_shape,
            given="three rows of two blocks of each kind",
        ),
        Probe(
            "a block of Q8_0 by hand",
            lambda f: _by_hand(f, "Q8_0"),
            equals(digits=3),
            given="d = 0.5 and the bytes 1, 2, 255, 128, 0, 0, …",
        ),
        Probe(
            "a block of Q4_1 by hand",
            lambda f: _by_hand(f, "Q4_1"),
            equals(),
            given="d = 0.5, m = −2 and the bytes 0xA3, 0x0F, 0x88, …: the numbers 0, 1, 2 and 16, 17, 18",
        ),
        Probe(
            "a block of Q4_0 by hand",
            lambda f: _by_hand(f, "Q4_0"),
            equals(),
            given="d = 0.5 and the bytes 0xA3, 0x0F, 0x88, …: the numbers 0, 1, 2 and 16, 17, 18",
        ),
        Probe(
            "equals the reference: five rows of three blocks",
            lambda f: tuple(f(_blocks(kind, 5, 3, seed=1), kind) for kind in SIZES),
            equals(),
        ),
        Probe(
            "rows that are not next to each other in memory",
            lambda f: tuple(f(_blocks(kind, 6, 2, seed=2)[::2], kind) for kind in SIZES),
            equals(),
        ),
        Probe("the bytes are left alone", _untouched, equals()),
        Probe(
            "an unknown kind is a ValueError",
            lambda f: outcome(lambda: f(_blocks("Q4_0", 1, 170), "Q5_7")),  # whole blocks of any kind
            equals(),
            given="kind = 'Q5_7'",
        ),
    ],
    misconceptions=[
        Misconception(
            "bytes without a sign",
            _decoder(signed="B"),
            "The bytes of Q8_0 were taken as 0 to 255. They are signed: 255 means −1, and 128 means −128. Look "
            "at them as int8.",
        ),
        Misconception(
            "halves in turns",
            _decoder(halves=_in_turns),
            "You took lower half, upper half, lower half, … as numbers 0, 1, 2, …. The lower halves are the first "
            "16 numbers of the block and the upper halves the last 16.",
        ),
        Misconception(
            "upper halves first",
            _decoder(halves=lambda b: [x >> 4 for x in b] + [x & 15 for x in b]),
            "The first 16 numbers came from the upper halves. Written as text, 0xA3 begins with A; but the lower "
            "half, 3, is the first number.",
        ),
        Misconception(
            "eight taken off a byte",
            _decoder(around=lambda q: (q - 8) % 256),
            "You took 8 off in uint8, which has nothing below zero: 3 − 8 is 251 there. Convert first, then subtract.",
        ),
        Misconception(
            "computed in fp16",
            _decoder(rounded=_to_fp16),
            "The numbers are right and rounded: the arithmetic was done in fp16, which keeps three digits. "
            "Make d (and m) fp32 before you multiply, not after.",
        ),
        Misconception(
            "m times d",
            _decoder(m_times_d=True),
            "You computed d · (q + m). In Q4_1 m is a weight already, the smallest of the block: d · q + m.",
        ),
        Misconception(
            "nothing below zero",
            _decoder(around=lambda q: q),
            "The 16 levels of Q4_0 lie around zero: take 8 off before you multiply, or all weights of a block "
            "have the same sign.",
        ),
        Misconception(
            "four bits with a sign",
            _decoder(around=lambda q: q - 16 if q > 7 else q),
            "You read the four bits as a signed number (two's complement), where 15 is −1. Q4_0 shifts instead: "
            "q − 8, so that 0 is the lowest level.",
        ),
    ],
)


# --- 3.7.b --------------------------------------------------------------------------------------------------

_TOP = {"tokens": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INNER = {
    "norm1": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def _theirs(ours: str, layer_of: Callable[[str], str] = str, names: Mapping[str, str] = _INNER) -> str:
    module = ours.removesuffix(".weight")
    if module in _TOP:
        return f"{_TOP[module]}.weight"
    _, layer, piece = module.split(".", 2)
    return f"model.layers.{layer_of(layer)}.{names[piece]}.weight"


def _load_llama(
    tensors: dict[str, Tensor],
    config: ModelConfig,
    *,
    swap: tuple[str, str] | None = None,
    alphabet: bool = False,
    change: Callable[[str, Tensor, ModelConfig], Tensor] = lambda name, tensor, config: tensor,
    head_follows: bool = False,
    shares: bool = False,
    strict: tuple[str, ...] = ("missing", "extra", "shape"),
    says_ours: bool = False,
) -> Transformer:
    """The reference, and, by its last arguments, what people write in its place."""
    names = dict(_INNER)
    if swap:
        names[swap[0]], names[swap[1]] = names[swap[1]], names[swap[0]]
    order = [str(i) for i in range(config.n_layers)]
    layer_of = dict(zip(order, sorted(order), strict=True)).__getitem__ if alphabet else str
    model, left = Transformer(config), dict(tensors)
    for name, parameter in model.named_parameters():
        theirs = _theirs(name, layer_of, names)
        said = name if says_ours else theirs
        if theirs not in left:
            if "missing" in strict:
                raise ValueError(said)
            continue
        tensor = change(name, left.pop(theirs), config)
        if tensor.shape != parameter.shape and "shape" in strict:
            raise ValueError(said)
        if shares:
            parameter.data = tensor.float()
        else:
            with torch.no_grad():
                parameter.copy_(tensor)
    if head_follows:
        model.head.weight = model.tokens.weight
    if left and "extra" in strict:
        raise ValueError(", ".join(left))
    return model


def _loader(**how: Any) -> Callable[[dict[str, Tensor], ModelConfig], Transformer]:
    return lambda tensors, config: _load_llama(tensors, config, **how)


def _put_rows(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    heads = {"q": config.n_heads, "k": config.n_kv_heads or config.n_heads}.get(name.split(".")[-2])
    return tensor if heads is None else interleaved_to_half(tensor, heads)


def _transpose(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
    return tensor.t() if square else tensor


def _config(**how: Any) -> ModelConfig:
    sizes = {"vocab_size": 24, "max_seq_len": 32, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}
    return ModelConfig(**{**sizes, "d_mlp": 32, "rope_base": 100_000.0, "d_head": 4, **how})


def _checkpoint(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors under their names, in an order of no use: norms first."""
    found = {
        _theirs(name): (randn(*p.shape, seed=seed + i) * 0.3 + (p.ndim == 1)).to(dtype)
        for i, (name, p) in enumerate(Transformer(config).named_parameters())
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].ndim, item[0])))


def _who_is_where(f: Callable) -> dict[str, str]:
    """Each tensor holds one number, its own, in all places: which of them is where?"""
    config = _config(tie_embeddings=False, n_layers=1)
    tensors = _checkpoint(config)
    names = list(tensors)
    marked = {name: torch.full_like(tensor, float(i)) for i, (name, tensor) in enumerate(tensors.items())}
    model = f(marked, config)
    held = {name: float(p.detach().flatten()[0]) for name, p in model.named_parameters()}
    return {name: names[int(i)] if i in range(len(names)) else "random numbers" for name, i in held.items()}


def _in_its_place(yours: Any, expected: Any) -> Failure | None:
    for name, right in expected.items():
        if name not in yours:
            return Failure(f"the model has no weight {name!r} of its own")
        if yours[name] != right:
            return Failure(f"our weight {name!r} does not hold {right!r}, but {yours[name]!r}")
    return None


def _logits(f: Callable, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    model = f(_checkpoint(config, seed, dtype), config)
    with torch.no_grad():
        return model(torch.arange(10)[None] * 7 % config.vocab_size)


def _what_comes_back(f: Callable) -> str:
    model = f(_checkpoint(_config()), _config())
    if not isinstance(model, Transformer):
        return f"a {type(model).__name__}"
    return "a Transformer in " + " and ".join(sorted({str(p.dtype) for p in model.parameters()}))


def _as_expected(yours: Any, expected: Any) -> Failure | None:
    return None if yours == expected else Failure(f"expected {expected}, but it returned {yours}")


def _parameters(f: Callable, config: ModelConfig) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in f(_checkpoint(config), config).named_parameters()}


def _place_of(yours: Any, expected: Any) -> Failure | None:
    judge = equals(digits=4)
    for name, right in expected.items():
        if name not in yours:
            return Failure(f"the model has no weight {name!r} of its own")
        if wrong := judge(yours[name], right):
            return Failure(f"in {name!r}, {wrong.sentence}", wrong.table)
    for name in yours:
        if name not in expected:
            return Failure(
                f"the model has a weight {name!r} of its own, but it should be one and the same with the table "
                "of tokens: the configuration ties them, and a copy would be trained apart"
            )
    return None


def _after_a_change(f: Callable) -> tuple[Tensor, Tensor]:
    config = _config()
    tensors = _checkpoint(config)
    model = f(dict(tensors), config)
    for tensor in tensors.values():
        tensor.zero_()
    return model.tokens.weight.detach(), model.blocks[1].mlp.up.weight.detach()


_DOWN = "model.layers.1.mlp.down_proj.weight"


def _left_alone(f: Callable) -> str | None:
    tensors = _checkpoint(_config(), dtype=torch.bfloat16)
    held, numbers = dict(tensors), {name: tensor.clone() for name, tensor in tensors.items()}
    f(tensors, _config())
    if tensors.keys() != held.keys():
        return f"`tensors` had {len(held)} names before, and now {len(tensors)}: work on a copy of the dictionary"
    for name, tensor in held.items():
        if tensors[name] is not tensor or not torch.equal(tensor, numbers[name]):
            return f"`tensors` holds something else for {name} now"
    return None


def _refusal(f: Callable, damage: Callable[[dict[str, Tensor]], Any], name: str, config: ModelConfig) -> str:
    tensors = _checkpoint(config)
    damage(tensors)
    try:
        f(tensors, config)
    except NotImplementedError:
        raise
    except ValueError as error:
        return "a ValueError that names it" if name in str(error) else "a ValueError without that name"
    except Exception as error:
        return f"a {type(error).__name__}"
    return "no error"


def _missing(f: Callable) -> dict[str, str]:
    """One left out in turn: people forget to ask for the norms, or take a missing head for a tied one."""
    config = _config(tie_embeddings=False)
    left_out = [_DOWN, "model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight"]
    return {name: _refusal(f, lambda t, n=name: t.pop(n), name, config) for name in left_out}


def _refused(yours: Any, expected: Any) -> Failure | None:
    for name, right in expected.items():
        if yours[name] != right:
            return Failure(f"for {name} there was {yours[name]}, expected {right}")
    return None


def _refuses(what: str, damage: Callable[[dict[str, Tensor]], None], name: str, given: str) -> Probe:
    return Probe(
        f"{what} is refused", lambda f: {name: _refusal(f, damage, name, _config())}, _refused, given
    )


LOAD = Exercise(
    id="3.7.b",
    symbol="load_llama",
    reference=_load_llama,
    look_again="Whose weight is whose",
    probes=[
        Probe("a Transformer comes back", _what_comes_back, _as_expected),
        Probe(
            "every tensor in its place",
            _who_is_where,
            _in_its_place,
            given="one layer; each tensor holds a single number in all places, its own",
        ),
        Probe("each number where it was", lambda f: _parameters(f, _config()), _place_of),
        Probe("the logits are right", lambda f: _logits(f, _config(), seed=1), equals(1e-4)),
        Probe(
            "an output layer of its own",
            lambda f: _logits(f, _config(tie_embeddings=False), seed=2),
            equals(1e-4),
        ),
        Probe(
            "twelve layers, wide heads, as many key heads as query heads",
            lambda f: _logits(f, _config(n_layers=12, n_kv_heads=None, d_head=8), seed=3),
            equals(1e-4),
        ),
        Probe(
            "from bf16 to fp32",
            lambda f: _logits(f, _config(), seed=4, dtype=torch.bfloat16),
            equals(1e-4),
        ),
        Probe("the numbers are the model's own", _after_a_change, equals()),
        Probe(
            "a missing tensor is refused",
            _missing,
            _refused,
            given="a model with an output layer of its own; one tensor is left out, and then another",
        ),
        _refuses(
            "a tensor without a place",
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(32, 16)}),
            "model.layers.2.mlp.up_proj.weight",
            "a third layer's tensor; the model has two layers",
        ),
        _refuses(
            "another shape",
            lambda tensors: tensors.update({_DOWN: torch.zeros(32, 16)}),
            _DOWN,
            "(32, 16) in the place of (16, 32)",
        ),
        _refuses(
            "a shape that could be spread out",
            lambda tensors: tensors.update({_DOWN: torch.zeros(16, 1)}),
            _DOWN,
            "(16, 1) in the place of (16, 32)",
        ),
        Probe("the dictionary is left alone", _left_alone, holds(lambda sentence: sentence)),
    ],
    misconceptions=[
        Misconception(
            "gate and up changed places",
            _loader(swap=("mlp.gate", "mlp.up")),
            "gate and up have the same shape, so nothing complains. The gate is the one that goes through SiLU.",
        ),
        Misconception(
            "the norms changed places",
            _loader(swap=("norm1", "norm2")),
            "`post_attention_layernorm` comes after the attention, and so before the MLP: it is our norm2. Llama "
            "has no norm behind a branch.",
        ),
        Misconception(
            "rows put in order that were in order",
            _loader(change=_put_rows),
            "You reordered the rows of q and k. That is for files of llama.cpp; Hugging Face's have them in our order.",
        ),
        Misconception(
            "square matrices transposed",
            _loader(change=_transpose),
            "You transposed the square matrices. Linear layers are (out, in) on both sides here; only GPT-2's "
            "files have them the other way, and with a square one no shape tells.",
        ),
        Misconception(
            "the head is always the table",
            _loader(head_follows=True),
            "The output layer reuses the table of tokens although this model has its own, `lm_head`: tie them "
            "only when the configuration says so.",
        ),
        Misconception(
            "layers in the order of the alphabet",
            _loader(alphabet=True),
            "You sorted names as text, and there layer 10 comes before layer 2. With up to ten layers nobody "
            "notices. Take the number out of our name and put it into theirs.",
        ),
        Misconception(
            "somebody else's memory",
            _loader(shares=True),
            "The parameters are the file's own tensors: who changes one, changes the other. Copy the numbers.",
        ),
        Misconception(
            "what is missing stays random",
            _loader(strict=("shape", "extra")),
            "A tensor that the file lacks is skipped, as `strict=False` does, and that layer keeps its random "
            "numbers. Say which tensor is missing.",
        ),
    ],
)


# --- 3.7.c --------------------------------------------------------------------------------------------------


def _put_back(
    name: str,
    tensor: Tensor,
    config: ModelConfig,
    *,
    values: bool = False,
    key_heads: str = "n_kv_heads",
    queries_only: bool = False,
    change: Callable[[Tensor, int], Tensor] = interleaved_to_half,
) -> Tensor:
    """The reference, and, by its last arguments, what people write in its place."""
    shared = config.n_kv_heads or config.n_heads
    heads = {"attn_q": config.n_heads, "attn_k": shared if key_heads == "n_kv_heads" else config.n_heads}
    if values:
        heads["attn_v"] = heads["attn_k"]
    if queries_only:
        del heads["attn_k"]
    which = name.split(".")[-2]
    return change(tensor, heads[which]) if which in heads else tensor


def _sorter(**how: Any) -> Callable[[str, Tensor, ModelConfig], Tensor]:
    return lambda name, tensor, config: _put_back(name, tensor, config, **how)


def _one_head(tensor: Tensor, heads: int) -> Tensor:
    return interleaved_to_half(tensor, 1)


GQA = ModelConfig(vocab_size=8, d_model=32, n_heads=4, n_kv_heads=2, n_layers=1, d_mlp=16)  # C = 8
FOURS = ModelConfig(vocab_size=8, d_model=16, n_heads=4, n_kv_heads=2, n_layers=1, d_mlp=16)  # C = 4
WIDE = ModelConfig(vocab_size=8, d_model=32, n_heads=4, n_kv_heads=2, n_layers=1, d_mlp=16, d_head=16)
SIX = ModelConfig(vocab_size=8, d_model=24, n_heads=6, n_kv_heads=2, n_layers=1, d_mlp=16, d_head=12)


def _rows_of(f: Callable, name: str, n: int, config: ModelConfig) -> Tensor:
    """Where n rows go: each holds its number."""
    rows = torch.arange(n, dtype=torch.float32)[:, None].expand(n, config.d_model).clone()
    return f(name, rows, config)[:, 0]


def _bystanders(f: Callable) -> dict[str, Tensor]:
    shapes = {
        "token_embd.weight": (8, 32),
        "blk.0.attn_v.weight": (32, 32),  # in two heads or, wrongly, in four: more than four channels each
        "blk.0.attn_output.weight": (32, 64),
        "blk.0.ffn_gate.weight": (16, 32),
        "blk.0.attn_norm.weight": (32,),
        "output_norm.weight": (32,),
    }
    return {name: f(name, randn(*shape, seed=1), WIDE) for name, shape in shapes.items()}


def _turned_alike(f: Callable) -> Tensor:
    """Scores of the layer as it should be: rows as llama.cpp has them go in, and come out put back."""
    x, C = randn(6, 32, seed=2), 8
    cos, sin = RotaryEmbedding(C)(torch.arange(6))
    scores = []
    q, k = randn(32, 32, seed=3), randn(16, 32, seed=4)
    weights = [
        f(f"blk.11.attn_{which}.weight", half_to_interleaved(weight, heads), GQA)
        for which, weight, heads in (("q", q, 4), ("k", k, 2))
    ]
    for head in range(4):
        parts = [w.reshape(-1, C, 32)[i] for w, i in zip(weights, (head, head // 2), strict=True)]
        q_head, k_head = (apply_rope((x @ part.T)[None, None], cos, sin)[0, 0] for part in parts)
        scores.append(q_head @ k_head.T / C**0.5)
    return torch.stack(scores)


def _inputs_after_sorting(f: Callable) -> Tensor:
    tensor = randn(32, 32, seed=5)
    f("blk.0.attn_q.weight", tensor, GQA)
    return tensor


PUT_BACK = Exercise(
    id="3.7.c",
    symbol="put_back",
    reference=_put_back,
    look_again="What goes wrong",
    equivalent_mutants={
        "`pairs.transpose(1, 2)` became `pairs.transpose(2, 1)`": "two dimensions change places, either way",
    },
    probes=[
        Probe(
            "shape and dtype",
            lambda f: (
                f("blk.0.attn_q.weight", randn(32, 32), GQA),
                f("blk.0.attn_k.weight", randn(16, 32), GQA),
                f("blk.0.attn_v.weight", randn(16, 32), GQA),
            ),
            same_shape,
        ),
        Probe(
            "what is not turned is left alone",
            _bystanders,
            _place_of,
            given="the table of tokens, values, the output projection, the gate, two norms",
        ),
        Probe(
            "queries, heads of four channels",
            lambda f: _rows_of(f, "blk.0.attn_q.weight", 16, FOURS),
            equals(digits=0),
            given="rows 0 to 15 of four heads, each row holding its number",
        ),
        Probe(
            "queries, heads of eight channels",
            lambda f: _rows_of(f, "blk.0.attn_q.weight", 32, GQA)[:8],
            equals(digits=0),
            given="rows 0 to 31 of four heads, each row holding its number; the first head comes back",
        ),
        Probe(
            "keys, two heads for four of queries",
            lambda f: _rows_of(f, "blk.0.attn_k.weight", 16, GQA),
            equals(digits=0),
            given="rows 0 to 15 of two heads, each row holding its number",
        ),
        Probe(
            "as many key heads as query heads",
            lambda f: _rows_of(f, "blk.3.attn_k.weight", 32, ModelConfig(d_model=32, n_heads=4)),
            equals(digits=0),
            given="n_kv_heads=None, n_heads=4",
        ),
        Probe(
            "keys, two wide heads for six of queries",
            lambda f: _rows_of(f, "blk.3.attn_k.weight", 24, SIX),
            equals(digits=0),
            given="d_model=24, n_heads=6, n_kv_heads=2, d_head=12; rows 0 to 23, each row holding its number",
        ),
        Probe("the scores of a layer are right", _turned_alike, equals(1e-4)),
        Probe("the tensor is left alone", _inputs_after_sorting, equals()),
    ],
    misconceptions=[
        Misconception(
            "nothing mended yet",
            _sorter(values=True, key_heads="n_heads", change=half_to_interleaved),
            "This is the code as it was given. Begin with the values: RoPE does not turn them.",
        ),
        Misconception(
            "values, too",
            _sorter(values=True),
            "Values are not turned by RoPE, so llama.cpp left their rows alone, and so must you.",
        ),
        Misconception(
            "values, and the wrong way",
            _sorter(values=True, change=half_to_interleaved),
            "Two bugs are left. Values are not turned by RoPE, so their rows are in order; and (2, C/2) builds "
            "the file's order, where (C/2, 2) takes it apart.",
        ),
        Misconception(
            "values, and key heads counted like query heads",
            _sorter(values=True, key_heads="n_heads"),
            "Two bugs are left. Values are not turned by RoPE, so their rows are in order; and keys have "
            "n_kv_heads heads.",
        ),
        Misconception(
            "the wrong way round",
            _sorter(change=half_to_interleaved),
            "(2, C/2) builds llama.cpp's order out of ours; you want the way back, (C/2, 2). With four channels the "
            "two are the same, which is why only the larger heads tell.",
        ),
        Misconception(
            "key heads counted like query heads",
            _sorter(key_heads="n_heads"),
            "The keys were cut into n_heads pieces, but they have n_kv_heads heads. When the numbers divide, no shape "
            "tells.",
        ),
        Misconception(
            "keys left alone",
            _sorter(queries_only=True),
            "Only the queries were put back. A score pairs channels of a query with channels of a key: both are "
            "turned, and both were reordered.",
        ),
        Misconception(
            "all heads as one",
            _sorter(change=_one_head),
            "You sorted the rows of all heads together, so heads exchange their channels. The order is inside each head.",
        ),
    ],
)


# --- 3.7.d --------------------------------------------------------------------------------------------------


def _decode_cost(
    config: ModelConfig,
    batch: int,
    context: int,
    weight_bytes: int = 4,
    cache_bytes: int = 4,
    *,
    additions: bool = True,
    mlp: int = 3,
    scoring_heads: str = "H",
    cached_heads: str = "G",
    shares_caches: bool = False,
    shares_weights: bool = True,
    tables: str = "head",
    windows: bool = True,
    kept: int = 2,
) -> tuple[int, int]:
    """The reference, layer by layer, and, by its last arguments, what people write in its place."""
    H, G = config.n_heads, config.n_kv_heads or config.n_heads
    C, D = config.d_head or config.d_model // H, config.d_model
    head = {"head": 1, "both": 2, "none": 0 if config.tie_embeddings else 1}
    matrices, flops, cache = head[tables] * config.vocab_size * D, 0, 0
    for layer in range(config.n_layers):
        window = config.window_of(layer) if windows else None
        K = context if window is None else min(window, context)
        matrices += D * H * C + D * G * C + D * G * C + H * C * D + mlp * D * config.d_mlp
        flops += 4 * {"H": H, "G": G}[scoring_heads] * C * K
        cache += kept * {"H": H, "G": G}[cached_heads] * C * K * cache_bytes
    flops = batch * (flops + 2 * matrices)
    weights = matrices * weight_bytes * (1 if shares_weights else batch)
    return flops if additions else flops // 2, weights + cache * (1 if shares_caches else batch)


def _counter(**how: Any) -> Callable[..., tuple[int, int]]:
    return lambda config, batch, context, weight_bytes=4, cache_bytes=4: _decode_cost(
        config, batch, context, weight_bytes, cache_bytes, **how
    )


TINY = ModelConfig(vocab_size=10, d_model=6, n_heads=3, n_kv_heads=1, n_layers=1, d_mlp=3)
SMALL = ModelConfig(vocab_size=100, d_model=24, n_heads=6, n_kv_heads=2, n_layers=3, d_mlp=40)


def _costs(f: Callable, config: ModelConfig, *how: int) -> list[int]:
    return [int(x) for x in f(config, *how)]


def _whole(yours: Any) -> str | None:
    if not isinstance(yours, (tuple, list)) or len(yours) != 2:
        return f"it returned a {type(yours).__name__}, expected two numbers, FLOPs and bytes"
    if not all(isinstance(x, Integral) for x in yours):
        slash = ": is there a / that should be //?" if any(isinstance(x, float) for x in yours) else ""
        return (
            f"FLOPs and bytes must be whole numbers (int), but these are {yours[0]!r} and {yours[1]!r}{slash}"
        )
    return None


def _same_costs(yours: Any, expected: Any) -> Failure | None:
    for what, y, right in zip(("FLOPs", "bytes"), yours, expected, strict=True):
        if y != right:
            return Failure(f"the {what} differ", {"yours": f"{y} {what}", "expected": f"{right} {what}"})
    return None


COST = Exercise(
    id="3.7.d",
    symbol="decode_cost",
    reference=_decode_cost,
    look_again="What a token costs",
    equivalent_mutants={
        "`min(context, window)` became `min(window, context)`": "the smaller of two has no order",
    },
    probes=[
        Probe("two whole numbers", lambda f: f(TINY, 1, 1), holds(_whole)),
        Probe(
            "a tiny model by hand",
            lambda f: _costs(f, TINY, 1, 5),
            _same_costs,
            given="D = 6, 3 query heads and 1 key head of 2 channels, 1 layer, F = 3, V = 10, 5 keys: 96 + 54 + "
            "60 = 210 numbers in matrices, so 420 + 4·3·2·5 = 540 FLOPs, and 4·210 + 2·1·2·5·4 = 920 bytes",
        ),
        Probe(
            "three layers",
            lambda f: _costs(f, SMALL, 1, 50),
            _same_costs,
            given="D = 24, 6 query heads and 2 key heads of 4 channels, 3 layers, F = 40, V = 100, 50 keys",
        ),
        Probe(
            "a batch of seven",
            lambda f: _costs(f, SMALL, 7, 50),
            _same_costs,
            given="the model of the probe before, seven rows",
        ),
        Probe(
            "weights in one byte, the cache in two",
            lambda f: _costs(f, SMALL, 3, 20, 1, 2),
            _same_costs,
            given="the same model, three rows, 20 keys",
        ),
        Probe(
            "an output layer of its own",
            lambda f: _costs(f, replace(SMALL, tie_embeddings=False), 2, 30),
            _same_costs,
            given="the same model with tie_embeddings=False, two rows, 30 keys: one multiplication with V × D numbers "
            "as before, for the table of tokens is looked up",
        ),
        Probe(
            "as many key heads as query heads, and wide ones",
            lambda f: _costs(f, replace(SMALL, n_kv_heads=None, d_head=16), 2, 30),
            _same_costs,
            given="the same model with n_kv_heads=None and d_head=16, two rows, 30 keys",
        ),
        Probe(
            "windows, in turns",
            lambda f: _costs(f, replace(SMALL, window=(8, None)), 2, 30),
            _same_costs,
            given="the same model with window=(8, None): 8, all and 8 of 30 keys",
        ),
        Probe(
            "a window that is not full yet",
            lambda f: _costs(f, replace(SMALL, window=16), 2, 5),
            _same_costs,
            given="the same model with window=16, and 5 keys",
        ),
    ],
    misconceptions=[
        Misconception(
            "multiplications only",
            _counter(additions=False),
            "Each multiplication is followed by an addition, and a FLOP is either: 2 for each number of a matrix, "
            "and 4 for each query head, channel and key (scores, then mixing).",
        ),
        Misconception(
            "an MLP of two matrices",
            _counter(mlp=2),
            "SwiGLU has three matrices, gate, up and down.",
        ),
        Misconception(
            "scores per key head",
            _counter(scoring_heads="G"),
            "Sharing key heads saves memory and no arithmetic: each query head still compares itself with every key.",
        ),
        Misconception(
            "a cache for every query head",
            _counter(cached_heads="H"),
            "The cache has the keys and values of the key heads, n_kv_heads of them. That is what they are shared for.",
        ),
        Misconception(
            "keys without values",
            _counter(kept=1),
            "The cache has keys and values: two numbers for each head, channel and token.",
        ),
        Misconception(
            "weights for each row",
            _counter(shares_weights=False),
            "You had the weights come from memory once for each row of the batch. They come once and serve all "
            "rows: this is what a batch saves.",
        ),
        Misconception(
            "one cache for all",
            _counter(shares_caches=True),
            "Each row has a past of its own, so keys and values come from memory for each row. A batch shares "
            "weights only.",
        ),
        Misconception(
            "a multiplication with both tables",
            _counter(tables="both"),
            "You counted the table of tokens as a matrix besides the output layer. A token takes one row of it, "
            "which costs nothing; only the output layer is multiplied.",
        ),
        Misconception(
            "no output layer",
            _counter(tables="none"),
            "The output layer is not counted. That it may share its numbers with the table of tokens saves memory, but "
            "each step reads all V × D of them and multiplies with them.",
        ),
        Misconception(
            "windows forgotten",
            _counter(windows=False),
            "Every layer looks at the whole context. One with a window has at most that many keys to look at, and "
            "windows differ from layer to layer: ask `config.window_of` for each.",
        ),
    ],
)

EXERCISES = [DEQUANTIZE, LOAD, PUT_BACK, COST]

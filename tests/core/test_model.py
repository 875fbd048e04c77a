"""The assembled `Transformer` against Hugging Face's models on random weights, and everything its config can say."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutorial_lib.checks.probes import fill_by_name, leaks
from tutorial_lib.core.gqa import Causal
from tutorial_lib.core.kv_cache import KVCache
from tutorial_lib.core.mlp import MLP
from tutorial_lib.core.model import PRESETS, ModelConfig, Transformer
from tutorial_lib.core.positional import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from tutorial_lib.core.rolling_cache import RollingKVCache
from tutorial_lib.core.rope import RopeScaling
from tutorial_lib.core.swiglu import SwiGLU
from tutorial_lib.core.window import SlidingWindow


def tiny(**fields) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 31, "max_seq_len": 16, "d_model": 24, "n_layers": 2, **fields})


def filled(config: ModelConfig) -> Transformer:
    return fill_by_name(Transformer(config), scale=0.2).eval()


def some_ids(V: int = 31, B: int = 2, T: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# ── The public families, as Hugging Face writes them ─────────────────────────────────────────────────────

NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
GPT2_NAMES = {
    "norm1": "ln_1",
    "attn.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
SHAPE = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 80, "attn_implementation": "eager"}
OURS = {"vocab_size": 101, "max_seq_len": 64, "d_model": 48, "n_layers": 3, "n_kv_heads": 2, "d_mlp": 80}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def theirs_of(family: str, fields: dict) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**fields)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def fill_theirs(ours: Transformer, theirs: nn.Module) -> None:
    """Give their model our weights, by name; every parameter of theirs must be filled exactly once."""
    targets = dict(theirs.named_parameters())
    whole = {"tokens": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.startswith("blocks."):
                _, layer, rest = name.split(".", 2)
                module, _, kind = rest.rpartition(".")
                target = f"model.layers.{layer}.{NAMES[module]}.{kind}"
            else:
                module, _, kind = name.rpartition(".")
                target = f"{whole[module]}.{kind}"
            targets.pop(target).copy_(p)
    assert not targets, f"nobody filled {list(targets)}"


def fill_gpt2(ours: Transformer, theirs: nn.Module) -> None:
    """GPT-2 keeps queries, keys and values in one matrix, and stores every matrix transposed."""
    whole = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
    source, targets = dict(ours.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for layer in range(ours.config.n_layers):
            for kind in ("weight", "bias"):
                parts = [source.pop(f"blocks.{layer}.attn.{part}.{kind}") for part in "qkv"]
                targets.pop(f"transformer.h.{layer}.attn.c_attn.{kind}").copy_(torch.cat(parts).t())
        for name, p in source.items():
            module, _, kind = name.rpartition(".")
            if name.startswith("blocks."):
                _, layer, rest = module.split(".", 2)
                target = f"transformer.h.{layer}.{GPT2_NAMES[rest]}.{kind}"
                transposed = "norm" not in rest
            else:
                target, transposed = f"transformer.{whole[module]}.{kind}", False
            targets.pop(target).copy_(p.t() if transposed else p)
    assert not targets, f"nobody filled {list(targets)}"


FAMILIES = {
    "Llama, keys shared": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, {}),
    "Llama, untied": (
        "Llama",
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_key_value_heads": 4},
        {"tie_embeddings": False, "n_kv_heads": None},
    ),
    "Llama 3, stretched": (
        "Llama",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3},
        {
            "rope_base": 500_000.0,
            "rope_scaling": RopeScaling("llama3", 8.0, original_max_seq_len=32),
        },
    ),
    "Mistral": (
        "Mistral",
        {"sliding_window": 7, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        {"window": 7, "tie_embeddings": False},
    ),
    "Qwen3": (
        "Qwen3",
        {"head_dim": 20, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        {"d_head": 20, "norm_eps": 1e-6, "qk_norm": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_public_model(family):
    name, their_fields, our_fields = FAMILIES[family]
    theirs = theirs_of(name, {**LLAMA, "max_position_embeddings": 256, **their_fields})
    ours = filled(ModelConfig(**{**OURS, **our_fields}))
    fill_theirs(ours, theirs)
    ids = some_ids(101, 2, 50)
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert b.std() > 0.3  # numbers that could differ
    assert (a - b).abs().max() <= 2e-5
    if name == "Mistral":  # the window is smaller than the text, so it must matter
        ours.blocks[0].attn.rule = Causal()
        with torch.no_grad():
            assert (ours(ids) - b).abs().max() > 1e-2


@pytest.mark.slow
def test_it_computes_what_gpt2_computes():
    fields = {"vocab_size": 101, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4}
    theirs = theirs_of("GPT2", {**fields, "attn_implementation": "eager"})
    gpt2 = {"norm": "layernorm", "mlp": "gelu_tanh", "rope": False, "bias": True}
    ours = filled(ModelConfig(101, 40, 48, n_layers=3, **gpt2))
    fill_gpt2(ours, theirs)
    ids = some_ids(101, 2, 40)
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert b.std() > 0.3
    assert (a - b).abs().max() <= 2e-5


PUBLISHED = {
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
}


def test_every_preset_is_counted():
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_published(name):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert model.num_params() == PUBLISHED[name]


# ── What the config says is what is built ────────────────────────────────────────────────────────────────


def test_the_config_chooses_the_pieces():
    llama, gpt2 = Transformer(tiny()), Transformer(tiny(norm="layernorm", mlp="gelu", rope=False, bias=True))
    assert isinstance(llama.blocks[0].mlp, SwiGLU) and isinstance(gpt2.blocks[0].mlp, MLP)
    assert type(llama.norm).__name__ == "RMSNorm" and type(gpt2.norm).__name__ == "LayerNorm"
    assert llama.rope is not None and llama.positions is None
    assert gpt2.rope is None and isinstance(gpt2.positions, LearnedPositionalEmbedding)
    assert not [name for name, _ in llama.named_parameters() if name.endswith("bias")]
    for module in gpt2.modules():
        if isinstance(module, nn.Linear) and module is not gpt2.head:
            assert module.bias is not None
    assert gpt2.head.bias is None


@pytest.mark.parametrize("tie", [True, False])
def test_tied_or_not(tie):
    model = Transformer(tiny(tie_embeddings=tie))
    assert (model.head.weight is model.tokens.weight) == tie
    assert model.num_params() - Transformer(tiny()).num_params() == (0 if tie else 31 * 24)
    fresh = Transformer(model.config)
    fresh.load_state_dict(fill_by_name(model).state_dict())
    assert (fresh.head.weight is fresh.tokens.weight) == tie
    assert torch.equal(fresh(some_ids()), model(some_ids()))


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("positions", [None, "none", "learned", "sinusoidal"])
def test_every_kind_of_position(rope, positions):
    model = filled(tiny(rope=rope, positions=positions))
    kind = positions or ("none" if rope else "learned")
    table = {
        "none": type(None),
        "learned": LearnedPositionalEmbedding,
        "sinusoidal": SinusoidalPositionalEmbedding,
    }
    assert isinstance(model.positions, table[kind])
    ids = some_ids()
    with torch.no_grad():
        out = model(ids)
        told = model(ids, positions=torch.arange(16))
        row_by_row = model(ids, positions=torch.arange(16).expand(2, 16))
        swapped = ids.clone()
        swapped[:, [3, 5]] = ids[:, [5, 3]]
        moved = (model(swapped)[:, -1] - out[:, -1]).abs().max()
    assert torch.equal(out, told) and (out - row_by_row).abs().max() < 1e-5
    assert leaks(model, ids) is None
    if kind != "none" or rope:
        assert moved > 1e-4, "the order of the past does not matter"


def test_without_positions_one_layer_cannot_tell_the_order():
    model, ids = filled(tiny(rope=False, positions="none", n_layers=1)), some_ids()
    swapped = ids.clone()
    swapped[:, [3, 5]] = ids[:, [5, 3]]
    torch.testing.assert_close(model(swapped)[:, -1], model(ids)[:, -1], atol=1e-5, rtol=1e-4)


def test_with_rope_only_distances_count():
    model, ids = filled(tiny(window=6)), some_ids()
    moved = model(ids, positions=torch.arange(100, 116))
    torch.testing.assert_close(moved, model(ids), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_a_table_ends(positions):
    model = filled(tiny(rope=False, positions=positions))
    assert model(some_ids(T=16)).shape == (2, 16, 31)
    with pytest.raises(IndexError, match="position 16 is past the table of 16"):
        model(some_ids(T=17))
    layers = model.new_cache(2, 40)
    with torch.no_grad(), pytest.raises(IndexError, match="position 16 is past the table of 16"):
        for piece in some_ids(T=17).split(4, dim=1):
            model(piece, cache=layers)


def test_rope_has_no_end_and_leaves_nothing_to_save():
    model = filled(tiny())
    assert model(some_ids(T=50)).isfinite().all()
    assert not [name for name in model.state_dict() if "rope" in name or "frequency" in name]
    assert set(model.state_dict()) == set(dict(model.named_parameters())) | {"head.weight"}
    assert "table" not in " ".join(Transformer(tiny(rope=False, positions="sinusoidal")).state_dict())


def test_in_bf16_the_angles_stay_exact():
    model = filled(tiny()).to(torch.bfloat16)
    near, far = model.rope(torch.tensor([256, 257]))[0]
    assert near.dtype == torch.float32 and not torch.equal(near, far)  # in bf16, 257 is 256
    assert model(some_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_the_soft_cap_bounds_the_logits(cap):
    ids = some_ids()
    loud = fill_by_name(Transformer(tiny(logit_soft_cap=cap)), scale=2.0).eval()
    plain = fill_by_name(Transformer(tiny()), scale=2.0).eval()
    with torch.no_grad():
        logits, uncapped = loud(ids), plain(ids)
    assert uncapped.abs().max() > cap and logits.abs().max() <= cap
    torch.testing.assert_close(logits, cap * torch.tanh(uncapped / cap))
    if cap > 1:
        assert logits.argmax(-1).equal(uncapped.argmax(-1))


@pytest.mark.parametrize(
    ("window", "expected"), [(None, [None] * 5), (4, [4] * 5), ((4, 9, None), [4, 9, None, 4, 9])]
)
def test_each_layer_has_its_window(window, expected):
    config = tiny(window=window, sinks=2, n_layers=5, max_seq_len=12)
    model = Transformer(config)
    assert [config.window_of(layer) for layer in range(5)] == expected
    for block, length, layer in zip(model.blocks, expected, model.new_cache(3), strict=True):
        rule = block.attn.rule
        assert (rule.window if isinstance(rule, SlidingWindow) else None) == length
        rolls = length is not None and 2 + length < 12
        assert isinstance(layer, RollingKVCache) == rolls
        assert layer.keys.shape[0] == 3 and (rolls or layer.keys.shape[2] == 12)
    if window is not None:
        assert leaks(filled(config), some_ids(T=12)) is None


def test_a_window_hides_and_sinks_show():
    ids = some_ids(T=16)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 31
    for sinks in (0, 1):
        model = filled(tiny(window=4, sinks=sinks, n_layers=1))
        with torch.no_grad():
            changed = (model(ids) - model(other)).abs().amax(dim=(0, 2)) > 1e-6
        assert changed[:4].all() and bool(changed[4:].any()) == bool(sinks)


def test_a_window_in_a_list_or_scaling_in_a_dict_is_as_good():
    config = tiny(window=[3, None], rope_scaling={"kind": "linear", "factor": 2.0})
    assert config.window == (3, None) and config.rope_scaling == RopeScaling("linear", 2.0)
    hash(config)


WRONG = {
    "norm": ({"norm": "rms"}, "unknown norm 'rms': choose rmsnorm or layernorm"),
    "mlp": ({"mlp": "swish"}, "unknown mlp 'swish': choose swiglu, relu, "),
    "positions": ({"positions": "rope"}, "unknown positions 'rope': choose learned, sinusoidal or none"),
    "no layers": ({"n_layers": 0}, "n_layers is 0, but must be at least 1"),
    "no words": ({"vocab_size": -1}, "vocab_size is -1, but must be at least 1"),
    "empty window": ({"window": ()}, "window is an empty tuple"),
    "no window": ({"window": 0}, "window is 0, but a token must at least see itself: use 1 or more"),
    "sinks": ({"window": 4, "sinks": -1}, "sinks is -1, but must be 0"),
    "cap": ({"logit_soft_cap": 0.0}, "logit_soft_cap is 0.0, but must be above 0: use None for no cap"),
    "heads": ({"n_heads": 5}, "d_model 24 does not split into 5 heads: try n_heads=4, or set d_head"),
    "key heads": ({"n_kv_heads": 3}, "4 query heads cannot share 3 key heads evenly: try n_kv_heads="),
    "odd head": ({"d_head": 7}, "d_head is 7, but RoPE turns channels in pairs: use an even number"),
    "scaling": (
        {"rope_scaling": {"kind": "yarn"}},
        "unknown RoPE scaling 'yarn': choose linear, ntk or llama3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_one_sentence(case):
    fields, sentence = WRONG[case]
    with pytest.raises(ValueError) as caught:
        Transformer(tiny(**fields))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


# ── How it starts, trains and is extended ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_it_starts_as_gpt2_does(mlp):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(256, 64, 128, n_layers=8, mlp=mlp, norm="layernorm", bias=True))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            end = name.endswith(("attn.out.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(16) if end else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
    ids = some_ids(256, 8, 33)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(256)) < 0.15


class Branches(nn.Module):
    """Only names and shapes of experts, in every form in which they may come; the model starts them."""

    def __init__(self, D: int = 128, M: int = 96, E: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU(D, M) for _ in range(E))  # experts.2.down.weight
        self.shared = SwiGLU(D, M)
        self.gate, self.up = nn.Parameter(torch.empty(E, M, D)), nn.Parameter(torch.empty(E, M, D))
        self.down = nn.Parameter(torch.empty(E, D, M))
        self.stacks = nn.Module()
        self.stacks.down = nn.Parameter(torch.empty(E, D, M))
        self.out = nn.Linear(D, D, bias=False)  # the attention's ends a branch, another does not
        self.down_scores = nn.Linear(D, D, bias=False)


def test_experts_start_as_the_mlp_does():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(64, 64, 128, n_layers=8), lambda layer: Branches())
    small = {"attn.out.weight", "mlp.down", "mlp.stacks.down", "mlp.shared.down.weight"}
    small |= {f"mlp.experts.{e}.down.weight" for e in range(3)}
    seen = set()
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            inside = name.removeprefix("blocks.").partition(".")[2]
            seen.add(inside)
            expected = 0.02 / math.sqrt(16) if inside in small else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.15 if "router" in name else 0.05), name
    assert small < seen


def test_outside_the_blocks_nothing_ends_a_branch():
    class Squeezed(Transformer):
        def _make_positions(self) -> nn.Module:
            return nn.ModuleDict({"net": SwiGLU(128)})

    torch.manual_seed(0)
    down = Squeezed(ModelConfig(64, n_layers=8)).positions["net"].down.weight
    assert down.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": True, "n_kv_heads": 1, "window": 4, "sinks": 1}, {"rope": False, "bias": True}]
)
def test_every_parameter_gets_a_gradient(fields):
    model = filled(tiny(**fields))
    F.cross_entropy(model(some_ids()).flatten(0, 1), some_ids(seed=1).flatten()).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    # A bias on the keys adds the same to all scores of a query, which a softmax does not notice.
    assert {name for name in silent if not name.endswith("attn.k.bias")} == set()


class Doubling(nn.Module):
    """A stand-in for experts."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.gain = layer, nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_another_feed_forward_plugs_in():
    asked = []

    def make_mlp(layer: int) -> nn.Module:
        asked.append(layer)
        return Doubling(layer) if layer % 2 else SwiGLU(24)

    model = Transformer(tiny(n_layers=4), make_mlp)
    assert asked == [0, 1, 2, 3]
    assert [type(block.mlp) for block in model.blocks] == [SwiGLU, Doubling] * 2
    assert model.blocks[1].mlp.gain.item() == 2.0  # the start of a vector is its maker's affair
    assert leaks(fill_by_name(model).eval(), some_ids()) is None
    model(some_ids()).sum().backward()
    assert model.blocks[3].mlp.gain.grad is not None


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("restart", [True, False])
def test_packed_documents_are_as_if_alone(rope, window, restart):
    model = filled(tiny(rope=rope, window=window, sinks=1 if restart else 0, n_kv_heads=2))
    ids, lengths = some_ids(B=1), (5, 8, 3)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = document[:, None] == document[None, :]  # (T, T)
    positions = torch.cat([torch.arange(n) for n in lengths])[None] if restart else None
    packed = model(ids, positions, mask=mask)
    for piece, length in zip(packed.split(lengths, dim=1), lengths, strict=True):
        start = next(i for i in range(16) if torch.equal(packed[:, i : i + length], piece))
        alone = model(ids[:, start : start + length])
        if restart or rope:  # a learned table that does not restart gives other vectors
            torch.testing.assert_close(piece, alone, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only():
    model, ids = fill_by_name(Transformer(tiny(dropout=0.3))), some_ids()
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))
    assert torch.equal(model(ids), filled_like(model)(ids))


def filled_like(model: Transformer) -> Transformer:
    """The same weights without dropout."""
    plain = Transformer(tiny())
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def test_hidden_and_logits_are_the_two_halves():
    model, ids = filled(tiny(logit_soft_cap=5.0)), some_ids()
    hidden = model.hidden(ids)
    assert hidden.shape == (2, 16, 24)
    assert torch.equal(model.logits(hidden), model(ids))
    torch.testing.assert_close(model.logits(hidden[:, -1]), model(ids)[:, -1], atol=1e-5, rtol=1e-4)


# ── The ring, from the outside ───────────────────────────────────────────────────────────────────────────


@cache
def windowed() -> Transformer:
    return filled(tiny(window=8, sinks=2, n_kv_heads=2, n_layers=3))


def tensors(layers: list[KVCache]) -> list:
    return [
        (name, t.shape, t.data_ptr()) for c in layers for name, t in vars(c).items() if isinstance(t, Tensor)
    ]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 8, 23])
def test_memory_stays_constant_over_twenty_windows(chunk):
    model, layers = windowed(), windowed().new_cache(1, 10_000)
    assert all(isinstance(layer, RollingKVCache) for layer in layers)
    at_first, nbytes = tensors(layers), [layer.nbytes for layer in layers]
    ids = some_ids(B=1, T=160)
    out = []
    for piece in ids.split(chunk, dim=1):
        out.append(model(piece, cache=layers))
        assert tensors(layers) == at_first and [layer.nbytes for layer in layers] == nbytes
    assert nbytes == [2 * (8 + 2 + 1) * 2 * 6 * 4] * 3
    assert (torch.cat(out, dim=1) - model(ids)).abs().max() < 1e-5


@torch.no_grad()
def test_the_ring_holds_sinks_and_window_after_any_chunks():
    ring, p = RollingKVCache(1, 1, 5, 2, 1), 0
    for size in (1, 3, 12, 1, 1, 6, 30, 2):
        positions = torch.arange(p, p + size)
        k = positions[None, None, :, None].float()
        keys, _, stood = ring.append(k, -k, positions)
        p += size
        assert torch.equal(keys[0, 0, :, 0], stood[0].float())  # each key with its own position
        wanted = {q for q in range(p) if q < 2 or q >= p - 5}
        assert {q for q in ring.positions[0].tolist() if q >= 0} == wanted
        assert set(stood[0].tolist()) >= {q for q in range(p) if q < 2 or q > p - size - 5}
        for slot, q in enumerate(ring.positions[0].tolist()):
            assert q < 0 or slot == (q if q < 2 else 2 + (q - 2) % 5)
    ring.reset()
    assert ring.length == 0 and (ring.positions == -1).all()


@torch.no_grad()
def test_a_row_that_is_done_can_be_padded_one_token_at_a_time():
    """Nothing is left in its ring for padding to look at, which must not give NaN, nor touch the others."""
    model, ids = windowed(), some_ids(T=40)
    layers = model.new_cache(2, 1000)
    expected = model(ids)
    model(ids[:, :20], torch.arange(20).expand(2, 20), layers)
    for t in range(20, 40):
        positions = torch.tensor([[t], [-1]])
        out = model(ids[:, t : t + 1], positions, layers)
        assert out.isfinite().all()
        assert (out[0, 0] - expected[0, t]).abs().max() < 1e-5


@torch.no_grad()
def test_the_ring_works_under_autocast():
    model, ids = windowed(), some_ids(T=24)
    with torch.autocast("cpu", torch.bfloat16):
        layers = model.new_cache(2, 1000)
        out = torch.cat([model(piece, cache=layers) for piece in ids.split(5, dim=1)], dim=1)
        expected = model(ids)
    assert (out.float() - expected.float()).abs().max() < 0.1 * expected.float().std()

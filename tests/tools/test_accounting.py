"""What a model costs: exact where it says so, and within a few percent of torch where it estimates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.core.experts import Experts
from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.core.model import PRESETS, ModelConfig, Transformer
from tutorial_lib.core.swiglu import SwiGLU
from tutorial_lib.kinds import KINDS
from tutorial_lib.tools.accounting import (
    KNOWN_SHAPES,
    ModelShape,
    activation_memory,
    count_parameters,
    flops_per_token,
    kv_cache_bytes,
    training_memory,
)
from tutorial_lib.tools.budget import six_nd, training_cost
from tutorial_lib.train.losses import lm_loss

CONFIGS = [
    GPTConfig(vocab_size=50, max_seq_len=16, d_model=24, n_heads=3, n_layers=2),
    GPTConfig(vocab_size=300, max_seq_len=20, d_model=32, n_heads=4, n_layers=3, d_mlp=40, bias=False),
    GPTConfig(vocab_size=70, max_seq_len=9, d_model=16, n_heads=1, n_layers=1, tie_embeddings=False),
]
GROUPS = {"embedding", "positions", "attention", "mlp", "experts", "router", "norms", "head"}
each_config = pytest.mark.parametrize("config", CONFIGS)


shape_of = KINDS["GPT"].shape


def batch(config: GPTConfig, batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch_size, config.max_seq_len + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


@each_config
def test_parameters_of_our_gpt(config):
    counts = count_parameters(shape_of(config))
    assert counts["total"] == GPT(config).num_params()
    assert counts["total"] == counts["active"] == sum(n for name, n in counts.items() if name in GROUPS)
    assert counts.keys() == GROUPS | {"total", "active"}
    assert all(type(n) is int for n in counts.values())


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt2", 124_439_808),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-405b", 405_853_388_800),
        ("mistral-7b", 7_241_732_096),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_parameters_of_public_models(name, total):
    assert count_parameters(KNOWN_SHAPES[name])["total"] == total


QWEN3 = ModelShape(
    151936, 2048, 48, 32, 4, 128, gated=True, tied=False, bias=False, norm="rmsnorm", qk_norm=True,
    n_experts=128, experts_per_token=8, d_expert=768,
)  # fmt: skip
DEEPSEEK = ModelShape(
    102400, 2048, 28, 16, d_mlp=10944, gated=True, tied=False, bias=False, norm="rmsnorm",
    n_experts=64, experts_per_token=6, n_shared_experts=2, d_expert=1408, n_moe_layers=27,
)  # fmt: skip


def test_parameters_of_public_mixtures_of_experts():
    mixtral = count_parameters(KNOWN_SHAPES["mixtral-8x7b"])
    assert (mixtral["total"], mixtral["active"]) == (46_702_792_704, 12_879_925_248)
    assert mixtral["mlp"] == 0 and mixtral["router"] == 32 * 8 * 4096
    qwen3 = count_parameters(QWEN3)  # Qwen3-30B-A3B
    assert qwen3["total"] == 30_532_122_624 and round(qwen3["active"] / 1e9, 1) == 3.4
    deepseek = count_parameters(DEEPSEEK)  # Dai et al. 2024: 16.4 billion, of which 2.8 are activated
    assert round(deepseek["total"] / 1e9, 1) == 16.4 and round(deepseek["active"] / 1e9, 1) == 2.8
    assert deepseek["mlp"] == 3 * 2048 * 10944  # the first layer has no experts


HYBRID = ModelShape(
    50, 24, 3, 4, d_mlp=40, gated=True, bias=False, norm="rmsnorm",
    n_experts=5, experts_per_token=2, n_shared_experts=1, d_expert=16, n_moe_layers=2,
)  # fmt: skip


def hybrid() -> Transformer:
    """What `HYBRID` says: experts in every second layer."""
    config = ModelConfig(50, 16, 24, 4, n_layers=3, d_mlp=40)
    return Transformer(config, lambda layer: SwiGLU(24, 40) if layer % 2 else Experts(24, 16, 5, bias=False))


def test_a_mixture_of_ours_is_counted():
    model, counts = hybrid(), count_parameters(HYBRID)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name or ".shared." in name)
    assert counts["experts"] == experts and counts["total"] == model.num_params()
    assert counts["router"] == sum(n for name, n in sizes.items() if ".router." in name)
    assert counts["mlp"] == sum(n for name, n in sizes.items() if name.startswith("blocks.1.mlp."))
    idle = sum(n for name, n in sizes.items() if any(f".experts.{e}." in name for e in (2, 3, 4)))
    assert counts["active"] == counts["total"] - idle


def test_experts_with_biases_are_counted():
    plain = ModelShape(50, 24, 3, 4, n_experts=5, experts_per_token=2, d_expert=16)
    expert = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))
    assert count_parameters(plain)["experts"] == 3 * 5 * sum(p.numel() for p in expert.parameters())
    gated = nn.ModuleList([nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 24)])
    counts = count_parameters(replace(plain, gated=True))
    assert counts["experts"] == 3 * 5 * sum(p.numel() for p in gated.parameters())


def test_gpt3_is_what_its_paper_says():
    assert round(count_parameters(KNOWN_SHAPES["gpt3"])["total"], -8) == 174_600_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_of_our_transformer(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(config)
    learned = config.positions == "learned" or (config.positions is None and not config.rope)
    shape = ModelShape(
        config.vocab_size,
        config.d_model,
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        config.d_head,
        config.d_mlp,
        gated=config.mlp == "swiglu",
        tied=config.tie_embeddings,
        learned_positions=config.max_seq_len if learned else 0,
        bias=config.bias,
        norm=config.norm,
        qk_norm=config.qk_norm,
    )
    assert count_parameters(shape)["total"] == sum(p.numel() for p in model.parameters())


def test_the_tiny_gpt_is_what_parts_1_and_2_build():
    config = GPTConfig(vocab_size=256, max_seq_len=64, d_model=128, n_heads=4, n_layers=2)
    assert shape_of(config) == KNOWN_SHAPES["tiny-gpt"]


def test_a_head_width_of_its_own():
    class Attention(nn.Module):  # Mistral Nemo and Gemma do not have H·C = D
        def __init__(self, D=20, H=3, G=1, C=8):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(D, H * C), nn.Linear(D, G * C), nn.Linear(D, G * C)
            self.out = nn.Linear(H * C, D)

    shape = ModelShape(10, 20, 4, 3, n_kv_heads=1, d_head=8)
    one = sum(p.numel() for p in Attention().parameters())
    assert count_parameters(shape)["attention"] == 4 * one
    assert kv_cache_bytes(shape, 1, 1, bytes_per_number=1) == 2 * 4 * 8


def test_replace_moves_the_widths_along():
    wider = replace(KNOWN_SHAPES["gpt2"], d_model=1024, n_heads=16, n_layers=24)
    assert (wider.mlp_width, wider.head_width, wider.kv_heads) == (4096, 64, 16)
    assert count_parameters(wider)["total"] == 354_823_168  # GPT-2 medium


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"norm": "batchnorm"}, "layernorm or rmsnorm"),
        ({"n_heads": 5}, "give d_head"),
        ({"n_heads": 4, "n_kv_heads": 3}, "evenly"),
        ({"n_experts": 8}, "a token uses 0 of 8 experts: give experts_per_token from 1 to n_experts"),
        ({"n_experts": 8, "experts_per_token": 9}, "a token uses 9 of 8 experts"),
        ({"experts_per_token": 2}, "a token uses 2 of 0 experts"),
        ({"n_shared_experts": 1}, "a token uses 0 of 0 experts"),
        ({"n_experts": 8, "experts_per_token": 2, "n_moe_layers": 2}, "n_moe_layers is 2, but there are 1"),
        ({"n_experts": 8, "experts_per_token": 2, "n_moe_layers": -1}, "n_moe_layers is -1"),
    ],
)
def test_a_shape_that_cannot_be_says_why(how, says):
    with pytest.raises(ValueError, match=says):
        ModelShape(**{"vocab_size": 10, "d_model": 8, "n_layers": 1, "n_heads": 2} | how)


@each_config
def test_flops_are_those_that_torch_counts(config):
    model, (inputs, labels) = GPT(config), batch(config)
    flops = flops_per_token(shape_of(config), config.max_seq_len)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        with FlopCounterMode(display=False) as forward:
            model(inputs)
        with FlopCounterMode(display=False) as training:
            lm_loss(model(inputs), labels).backward()
    assert forward.get_total_flops() == inputs.numel() * flops["forward"]
    assert training.get_total_flops() == inputs.numel() * flops["training"]


def test_flops_of_experts_are_those_of_the_chosen():
    model, T = hybrid(), 16
    inputs = torch.randint(0, 50, (3, T), generator=torch.Generator().manual_seed(0))
    flops = flops_per_token(HYBRID, T)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            model(inputs)
        with FlopCounterMode(display=False) as training:
            lm_loss(model(inputs), inputs).backward()
    assert forward.get_total_flops() == inputs.numel() * flops["forward"]
    assert training.get_total_flops() == inputs.numel() * flops["training"]


def test_causal_flops_are_those_of_the_pairs_that_see_each_other():
    shape, T = KNOWN_SHAPES["llama-3-8b"], 77
    full, causal = flops_per_token(shape, T), flops_per_token(shape, T, causal=True)
    pairs = sum(t + 1 for t in range(T))
    for term in ("scores", "mixing"):
        assert full[term] == 2 * 32 * 4096 * T
        assert causal[term] * T == 2 * 32 * 4096 * pairs
    assert {k: v for k, v in full.items() if k in ("projections", "mlp", "head")}.items() <= causal.items()
    assert causal["forward"] == sum(v for k, v in causal.items() if k not in ("forward", "training"))


def test_a_token_costs_two_flops_for_each_number_it_is_multiplied_by():
    for shape in KNOWN_SHAPES.values():
        groups, flops = count_parameters(replace(shape, bias=False)), flops_per_token(shape, 0)
        assert flops["projections"] == 2 * groups["attention"] and flops["mlp"] == 2 * groups["mlp"]
        used = groups["experts"] - (groups["total"] - groups["active"])
        assert flops["experts"] == 2 * used and flops["router"] == 2 * groups["router"]
        assert flops["head"] == 2 * groups["embedding"]  # the same size, tied or not


def test_six_nd_is_what_the_papers_state():
    assert six_nd(174.6e9, 300e9) == pytest.approx(3.14e23, rel=0.01)  # Brown et al. 2020
    assert six_nd(405e9, 15.6e12) == pytest.approx(3.8e25, rel=0.01)  # Dubey et al. 2024


@each_config
@pytest.mark.parametrize("batch_size", [1, 8])
def test_memory_is_within_five_percent_of_torchs(config, batch_size):
    model, (inputs, labels) = GPT(config), batch(config, batch_size)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    optimizer = torch.optim.AdamW(model.parameters())
    with saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = lm_loss(model(inputs), labels)
    loss.backward()
    optimizer.step()
    memory = training_memory(shape_of(config), batch_size, config.max_seq_len)
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]  # not the step count
    assert memory["weights"] == memory["gradients"] == sum(p.nbytes for p in model.parameters())
    assert memory["optimizer"] == sum(t.nbytes for t in states)
    assert memory["activations"] == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.05)
    assert memory["total"] == sum(n for name, n in memory.items() if name != "total")


def test_gated_and_grouped_activations():
    T, D, M, H = 6, 16, 24, 4

    class Layer(nn.Module):
        """Llama's block with fused norms, for what autograd keeps of it."""

        def __init__(self):
            super().__init__()
            self.norm1, self.norm2, self.norm = nn.RMSNorm(D), nn.RMSNorm(D), nn.RMSNorm(D)
            self.gate, self.up = nn.Linear(D, M, bias=False), nn.Linear(D, M, bias=False)
            self.down = nn.Linear(M, D, bias=False)

    layer, kept = Layer(), {}
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(2, T, D, requires_grad=True) + 0
    with saved_tensors_hooks(remember, lambda tensor: tensor):
        layer.down(nn.functional.silu(layer.gate(x)) * layer.up(x))
    mine = {k: s for k, s in kept.items() if k not in weights}
    shape = ModelShape(10, D, 1, H, 2, d_mlp=M, gated=True, bias=False, norm="rmsnorm")
    terms = activation_memory(shape, 2, T)
    assert sum(s.nbytes() for s in mine.values()) == terms["mlp"] + 2 * T * D * 4  # and the norm's output
    assert terms["attention"] == 2 * T * (4 * (16 + 2 * 8 + 16) + 4 * H)


def test_activations_of_experts_are_within_five_percent_of_torchs():
    B, T, D, M, E = 2, 40, 64, 96, 6
    layer, kept = Experts(D, M, E, bias=False), {}
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(B, T, D, requires_grad=True) + 0
    with saved_tensors_hooks(remember, lambda tensor: tensor):
        layer(x)
    experts = {"n_experts": E, "experts_per_token": 2, "n_shared_experts": 1}
    shape = ModelShape(10, D, 1, 4, d_mlp=M, gated=True, bias=False, norm="rmsnorm", **experts)
    terms = activation_memory(shape, B, T)
    measured = (
        sum(s.nbytes() for key, s in kept.items() if key not in weights) - B * T * D * 4
    )  # the norm's output
    assert terms["experts"] + terms["router"] == pytest.approx(measured, rel=0.05)
    assert terms["mlp"] == 0 and terms["total"] == sum(n for name, n in terms.items() if name != "total")


def test_training_keeps_all_experts_and_activations_of_the_used():
    few = KNOWN_SHAPES["mixtral-8x7b"]
    many = replace(few, n_experts=16)
    a, b = (training_memory(shape, 1, 1024) for shape in (few, many))
    more = count_parameters(many)["total"] - count_parameters(few)["total"]
    assert b["weights"] - a["weights"] == 4 * more and b["optimizer"] - a["optimizer"] == 8 * more
    assert b["activations"] - a["activations"] == 1024 * 32 * 8 * 4  # eight more scores, in each layer
    assert kv_cache_bytes(many, 1, 1) == kv_cache_bytes(KNOWN_SHAPES["mistral-7b"], 1, 1)


def test_mixed_precision_takes_sixteen_bytes_a_parameter():
    shape = KNOWN_SHAPES["llama-2-7b"]
    N = count_parameters(shape)["total"]
    assert training_memory(shape, 0, 0, 2, 2, 12, 2)["total"] == 16 * N
    assert training_memory(shape, 0, 0)["total"] == 16 * N


def test_a_cache_takes_the_bytes_of_its_keys_and_values():
    # Llama 2 7B in fp16: half a mebibyte for each token.
    assert kv_cache_bytes(KNOWN_SHAPES["llama-2-7b"], 1, 1) == 2**19
    assert kv_cache_bytes(KNOWN_SHAPES["llama-3-8b"], 3, 8192) == 3 * 2**30


def test_time_energy_and_money_are_those_of_llama_65b():
    cost = training_cost(3.6e18, 1e15, 0.5, 700, 2.0, chips=4, overhead=1.5)
    assert cost == pytest.approx({"chip_hours": 2, "hours": 0.5, "kilowatt_hours": 2.1, "money": 4})
    # LLaMA 65B (Touvron et al. 2023a, table 15): 1,022,362 A100 hours are 449 MWh at a PUE of 1.1.
    hours = 1_022_362
    cost = training_cost(hours * 3600 * 312e12 * 0.5, 312e12, 0.5, 400, 0.0, overhead=1.1)
    assert cost["kilowatt_hours"] / 1000 == pytest.approx(449, rel=0.005)


@pytest.mark.parametrize("utilization", [40, 1.01, 0, -0.4])
def test_a_utilization_is_a_fraction(utilization):
    with pytest.raises(ValueError, match="fraction"):
        training_cost(1, 1, utilization, 1, 1)

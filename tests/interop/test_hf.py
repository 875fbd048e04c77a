"""Hugging Face's checkpoints: `transformers` computes the same from its folder and from ours, and nothing is lost."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.interop.models import CONFIGS, GPT2, SHAPE, one_sentence, ours, same_weights, shaken, weights

pytest.importorskip("transformers")

import transformers

from tutorial_lib.core.decoding import generate_cached
from tutorial_lib.core.model import PRESETS, ModelConfig
from tutorial_lib.core.rope import RopeScaling
from tutorial_lib.core.swiglu import gated_width
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.hf import hf_config, load_hf, save_hf
from tutorial_lib.interop.hf_config import from_hf_config, to_hf_config
from tutorial_lib.interop.tokenizers import load_tokenizer, same_tokenizer
from tutorial_lib.interop.weights import WeightsError
from tutorial_lib.moe.model import MOE_PRESETS, MoEConfig
from tutorial_lib.quant.int8 import to_int8

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
THEIRS = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_THEIRS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def their_configs():
    tied = {"tie_word_embeddings": True}
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ends = {"bos_token_id": None, "eos_token_id": None}
    linear = {"rope_type": "linear", "factor": 2.0}
    return {
        "llama": transformers.LlamaConfig(
            **THEIRS, rope_parameters={"rope_type": "default", "rope_theta": 5e3}, rms_norm_eps=1e-5
        ),
        "llama3": transformers.LlamaConfig(
            **THEIRS,
            **tied,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-5,
            rope_parameters={**LLAMA3_THEIRS, "rope_theta": 1e4},
        ),
        "linear": transformers.LlamaConfig(
            **{**THEIRS, "num_key_value_heads": 1}, **tied, rope_parameters={**linear, "rope_theta": 1e4}
        ),
        "mistral": transformers.MistralConfig(**THEIRS, sliding_window=7, rms_norm_eps=1e-5),
        "qwen3": transformers.Qwen3Config(**THEIRS, **tied, head_dim=24),
        "qwen3-windows": transformers.Qwen3Config(
            **THEIRS, **tied, **windows, head_dim=24, rms_norm_eps=1e-5
        ),
        "gpt2": transformers.GPT2Config(
            vocab_size=96, n_positions=64, n_embd=48, n_head=4, n_layer=3, n_inner=80, **ends
        ),
        "mixtral": transformers.MixtralConfig(**THEIRS, num_local_experts=4, router_aux_loss_coef=0.02),
        "mixtral-window": transformers.MixtralConfig(
            **{**THEIRS, "num_key_value_heads": 1},
            **tied,
            head_dim=16,
            sliding_window=7,
            num_local_experts=5,
            num_experts_per_tok=3,
            router_aux_loss_coef=0.01,
            rope_parameters={**LLAMA3_THEIRS, "rope_theta": 1e6},
        ),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **THEIRS,
            **tied,
            head_dim=24,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
        ),
        "qwen3_moe-hybrid": transformers.Qwen3MoeConfig(
            **{**THEIRS, "num_hidden_layers": 6, "num_key_value_heads": 4},
            num_experts=3,
            num_experts_per_tok=1,
            moe_intermediate_size=88,
            decoder_sparse_step=2,
            mlp_only_layers=[0, 1],
            use_sliding_window=True,
            sliding_window=9,
            rms_norm_eps=1e-5,
            router_aux_loss_coef=0.0,
        ),
    }


@pytest.fixture(scope="module")
def theirs():
    configs = their_configs()
    assert configs.keys() == CONFIGS.keys()
    return {name: shaken(transformers.AutoModelForCausalLM.from_config(c)) for name, c in configs.items()}


def their_loader(folder: Path):
    """What `transformers` makes of a folder, and that it found there what it wanted, and nothing else."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not {key: value for key, value in info.items() if value}
    return model.eval()


def plain(config: ModelConfig) -> ModelConfig:
    """The same shape, with all that is None by default written out."""
    if isinstance(config, MoEConfig):
        config = plain_experts(config)
    gated = config.mlp == "swiglu"
    windows = tuple(config.window_of(layer) for layer in range(config.n_layers))
    return replace(
        config,
        n_kv_heads=config.n_kv_heads or config.n_heads,
        d_head=config.d_head or config.d_model // config.n_heads,
        d_mlp=config.d_mlp or (gated_width(config.d_model) if gated else 4 * config.d_model),
        positions=config.positions or ("none" if config.rope else "learned"),
        window=windows,
        dropout=0.0,
        **({} if config.rope else {"rope_base": 0.0, "rope_scaling": None}),
    )


def plain_experts(config: MoEConfig) -> MoEConfig:
    """Which layers have experts can be said in several ways; Mixtral has no other width than that of an expert."""
    width = config.mlp_width if config.qk_norm else config.expert_width
    first = next(layer for layer in range(config.n_layers) if config.has_experts(layer))
    return replace(
        config,
        d_mlp=width,
        d_expert=config.expert_width,
        dense_first=first,
        capacity_factor=None,
        z_loss_coef=0.0,
    )


def greedy(model, n: int = 12) -> list[int]:
    return [int(token) for token in generate_cached(model, IDS[:1, :20], n, temperature=0)]


# --- the same function --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shard", ["10GB", "30KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_transformers_computes(theirs, name, shard, tmp_path):
    model = theirs[name]
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard == "10GB")
    mine = load_hf(tmp_path)
    assert plain(mine.config) == plain(CONFIGS[name]) and not mine.training
    wanted = model(IDS).logits
    assert wanted.std() > 0.1  # something is computed
    torch.testing.assert_close(mine(IDS), wanted, atol=2e-5, rtol=0)
    written = IDS[:1, :20]
    for _ in range(12):
        written = torch.cat([written, model(written, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert greedy(mine) == written[0, 20:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_what_we_compute(name, shard_bytes, tmp_path):
    model = ours(CONFIGS[name])
    folder = save_hf(model, tmp_path / "new" / "folder", shard_bytes=shard_bytes)
    files = sorted(path.name for path in folder.iterdir())
    assert (files == ["config.json", "model.safetensors"]) == (shard_bytes == 10**9)
    torch.testing.assert_close(their_loader(folder)(IDS).logits, model(IDS), atol=2e-5, rtol=0)
    back = load_hf(folder)
    assert plain(back.config) == plain(model.config) and same_weights(back, model)
    assert (back.head.weight is back.tokens.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_shard_is_not_larger_than_asked(name, tmp_path):
    folder = save_hf(ours(CONFIGS[name]), tmp_path / "m", shard_bytes=30_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert (
        sum(w.numel() * 4 for f in folder.glob("*.safetensors") for w in load_file(f).values())
        == (index["metadata"]["total_size"])
    )
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(w.nbytes for w in tensors.values()) <= 30_000


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral", "qwen3_moe-hybrid"])
def test_half_precision_stays_as_it_is(name, tmp_path):
    model = ours(CONFIGS[name]).bfloat16()
    folder = save_hf(model, tmp_path / "m")
    assert all(w.dtype == torch.bfloat16 for w in load_file(folder / "model.safetensors").values())
    assert same_weights(load_hf(folder, torch.bfloat16), model)
    assert same_weights(load_hf(folder), model.float())  # every bf16 number is an fp32 number
    assert their_loader(folder).dtype == torch.bfloat16


def test_the_type_of_the_numbers_can_be_chosen(tmp_path):
    model = ours(CONFIGS["gpt2"])
    folder = save_hf(model, tmp_path / "m", dtype=torch.float16)
    assert same_weights(load_hf(folder, torch.float16), ours(CONFIGS["gpt2"]).half())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


@torch.no_grad()
def test_the_names_of_the_first_gpt2(theirs, tmp_path):
    """`wte.weight` and `h.0.…`, with the mask and its fill stored beside the weights."""
    theirs["gpt2"].save_pretrained(tmp_path)
    old = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        old[name.removeprefix("transformer.")] = weight
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "wte.weight" in old
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(load_hf(tmp_path)(IDS), theirs["gpt2"](IDS).logits, atol=2e-5, rtol=0)


def test_tensors_that_can_be_computed_may_stand_there(tmp_path):
    folder = save_hf(model := ours(CONFIGS["linear"]), tmp_path / "m")
    file = folder / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "lm_head.weight": model.tokens.weight.detach().clone(),
    }
    save_file({**load_file(file), **extra}, file)
    assert same_weights(load_hf(folder), model)


# --- configurations -----------------------------------------------------------------------------------------

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
PUBLISHED = {
    "llama-3.2-1b": LLAMA_1B,
    "mistral-7b": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3-0.6b": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_our_presets(name):
    assert plain(from_hf_config(PUBLISHED[name])) == plain({**PRESETS, **MOE_PRESETS}[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_said_is_asked_for_or_as_transformers_has_it(name):
    """Each family has defaults of its own, which save_pretrained does not always write."""
    said = to_hf_config(CONFIGS[name])
    asked = set()
    for key in said.keys() - {"model_type"}:
        left = {k: value for k, value in said.items() if k != key}
        try:
            found = plain(from_hf_config(left))
        except WeightsError as error:
            assert re.search(f"does not say|{key}|biases", str(error))
            asked.add(key)
            continue
        theirs = transformers.AutoConfig.for_model(**left).to_json_string()
        assert plain(from_hf_config(json.loads(theirs))) == found, key
    assert len(asked) < 12


even = st.integers(1, 64).map(lambda n: 2 * n)
numbers = st.floats(1e-12, 0.1)
scalings = (
    st.none()
    | st.builds(RopeScaling, st.just("linear"), st.floats(1, 64))
    | st.builds(
        RopeScaling,
        st.just("llama3"),
        st.floats(1, 64),
        st.integers(16, 8192),
        st.floats(0.5, 1),
        st.floats(2, 8),
    )
)


@st.composite
def expressible(draw) -> ModelConfig:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    layers = draw(st.integers(1, 5))
    common = {
        "vocab_size": draw(st.integers(1, 300_000)),
        "max_seq_len": draw(st.integers(1, 200_000)),
        "n_heads": heads,
        "n_layers": layers,
        "d_model": heads * draw(even),
        "d_mlp": draw(st.none() | st.integers(1, 999)),
        "norm_eps": draw(numbers),
        "tie_embeddings": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
    }
    kind = draw(st.sampled_from(["gpt2", "llama", "mistral", "qwen3", "mixtral", "qwen3_moe"]))
    if kind == "gpt2":
        return ModelConfig(**common, **GPT2)
    window = st.integers(1, 5000)
    if kind == "qwen3":  # the same length in all layers that have one
        size = draw(window)
        some = st.lists(st.sampled_from([None, size]), min_size=1, max_size=layers).map(tuple)
        window = st.none() | st.just(size) | some
    experts = {}
    if kind in ("mixtral", "qwen3_moe"):
        n_experts = draw(st.integers(1, 300))
        experts = {
            "n_experts": n_experts,
            "experts_per_token": draw(st.integers(min(n_experts, 2), n_experts)),
        }
        experts |= {"d_expert": draw(st.none() | st.integers(1, 999)), "aux_loss_coef": draw(st.floats(0, 1))}
        window = st.none() | st.integers(1, 5000)
    if kind == "qwen3_moe":
        every = draw(st.integers(1, layers))
        experts |= {"moe_every": every, "dense_first": draw(st.integers(0, layers // every * every - 1))}
        if draw(st.booleans()):
            experts |= {"renormalize": False, "experts_per_token": draw(st.integers(1, n_experts))}
    return (MoEConfig if experts else ModelConfig)(
        **common,
        **experts,
        n_kv_heads=draw(st.none() | st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        d_head=draw(st.none() | even),
        rope_base=draw(st.floats(1.5, 1e7)),
        rope_scaling=draw(scalings),
        qk_norm=kind.startswith("qwen3"),
        window=None if kind == "llama" else draw(window),
        bias=kind == "llama" and draw(st.booleans()),
    )


@given(expressible())
def test_a_configuration_comes_back_as_it_was(config):
    said = json.loads(json.dumps(to_hf_config(config)))
    assert plain(from_hf_config(said)) == plain(config)


@given(expressible())
def test_transformers_reads_the_same_out_of_it(config):
    found = transformers.AutoConfig.for_model(**to_hf_config(config))
    wanted = plain(config)
    assert (found.vocab_size, found.tie_word_embeddings) == (wanted.vocab_size, wanted.tie_embeddings)
    assert (found.hidden_size, found.num_attention_heads) == (wanted.d_model, wanted.n_heads)
    assert (found.num_hidden_layers, found.max_position_embeddings) == (wanted.n_layers, wanted.max_seq_len)
    if config.norm == "layernorm":
        assert (found.n_inner or 4 * found.n_embd, found.layer_norm_epsilon) == (
            wanted.d_mlp,
            wanted.norm_eps,
        )
        return
    wide = (
        config.mlp_width if found.model_type == "qwen3_moe" else wanted.d_mlp
    )  # said, even where no layer has it
    assert (found.intermediate_size, found.num_key_value_heads) == (wide, wanted.n_kv_heads)
    assert (found.rms_norm_eps, found.head_dim) == (wanted.norm_eps, wanted.d_head)
    rope = found.rope_parameters
    assert rope["rope_theta"] == wanted.rope_base
    assert rope["rope_type"] == (config.rope_scaling.kind if config.rope_scaling else "default")
    assert rope.get("factor", 1.0) == (config.rope_scaling.factor if config.rope_scaling else 1.0)
    if isinstance(config, MoEConfig):
        assert (found.num_local_experts, found.num_experts_per_tok) == (
            config.n_experts,
            config.experts_per_token,
        )
        assert (found.router_aux_loss_coef, found.sliding_window) == (config.aux_loss_coef, config.window)
        if config.qk_norm:
            assert (found.moe_intermediate_size, found.norm_topk_prob) == (
                wanted.d_expert,
                config.renormalize,
            )
            assert found.decoder_sparse_step == config.moe_every
            assert found.mlp_only_layers == list(range(config.dense_first))
    elif config.qk_norm:
        layers = [found.sliding_window if kind == "sliding_attention" else None for kind in found.layer_types]
        assert tuple(layers) == wanted.window
    elif config.window:
        assert found.model_type == "mistral" and found.sliding_window == config.window
    else:
        assert found.attention_bias == found.mlp_bias == config.bias


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mlp": "gelu"}, "mlp"),
        ({"rope": False}, "rope"),
        ({"positions": "learned"}, "positions"),
        ({"positions": "sinusoidal", "rope": False}, "rope"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"window": 8, "sinks": 4}, "sinks"),
        ({"rope_scaling": RopeScaling("ntk", 2.0)}, "rope_scaling"),
        ({"window": (8, None)}, "window"),
        ({"window": (8, 9), "qk_norm": True}, "window"),
        ({"window": 8, "bias": True}, "window"),
        ({"qk_norm": True, "bias": True}, "qk_norm"),
        ({**GPT2, "mlp": "gelu"}, "mlp"),
        ({**GPT2, "mlp": "swiglu"}, "mlp"),
        ({**GPT2, "rope": True}, "rope"),
        ({**GPT2, "positions": "sinusoidal"}, "positions"),
        ({**GPT2, "positions": "none"}, "positions"),
        ({**GPT2, "bias": False}, "bias"),
        ({**GPT2, "qk_norm": True}, "qk_norm"),
        ({**GPT2, "window": 8}, "window"),
        ({**GPT2, "n_kv_heads": 2}, "n_kv_heads"),
        ({**GPT2, "d_head": 16}, "d_head"),
        ({**GPT2, "logit_soft_cap": 30.0}, "logit_soft_cap"),
    ],
)
def test_what_no_family_has_is_named(changes, field, tmp_path):
    config = ModelConfig(**{**SHAPE, **changes})
    with pytest.raises(WeightsError, match=field) as error:
        to_hf_config(config)
    assert one_sentence(error.value)
    with pytest.raises(WeightsError, match=field):
        save_hf(ours(config), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "'mamba'.*gpt2, llama, mistral, qwen3"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": [1]}, "RoPE"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "channels"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, "layer_types"),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"],
            },
            "layer_types",
        ),
    ],
)
def test_what_our_transformer_has_not_is_named(changes, said):
    with pytest.raises(WeightsError, match=said) as error:
        from_hf_config({**LLAMA_1B, **changes})
    assert one_sentence(error.value)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_what_must_be_said_is_asked_for(name):
    with pytest.raises(WeightsError, match=name):
        from_hf_config({key: value for key, value in LLAMA_1B.items() if key != name})


# --- tensors that are not what they should be ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "'model.layers.1.mlp.up_proj.weight' is missing",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
            "layers.3.mlp.up_proj.*not part",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"model.norm.weight.*\(47,\).*\(48,\)"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
            "layers.0.self_attn.q_proj.bias.*not part",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(48, 24)}),
            r"k_proj.*\(48, 24\).*\(24, 48\)",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.upproj.weight": t.pop("model.layers.1.mlp.up_proj.weight")}
            ),
            "up_proj.weight' is missing .*'model.layers.1.mlp.upproj.weight'",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            "model.norm.weight.*int8",
        ),
    ],
)
def test_a_wrong_tensor_is_named(change, said, tmp_path):
    folder = save_hf(ours(CONFIGS["llama"]), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=said) as error:
        load_hf(folder)
    assert one_sentence(error.value)


def test_untied_weights_of_a_tied_model_are_seen(tmp_path):
    folder = save_hf(ours(CONFIGS["llama"]), tmp_path / "m")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "tie_word_embeddings": True}))
    assert load_hf(folder).config.tie_embeddings  # as transformers: the head in the file is not looked at
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match="'lm_head.weight' is missing"):
        load_hf(folder)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(WeightsError, match="not empty"):
        save_hf(ours(CONFIGS["llama"]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(WeightsError, match="there already"):
        save_hf(ours(CONFIGS["llama"]), tmp_path / "mine.txt")
    (tmp_path / "empty").mkdir()
    assert hf_config(save_hf(ours(CONFIGS["llama"]), tmp_path / "empty")).d_model == 48


def test_what_is_not_the_configurations_model_is_not_written(tmp_path):
    with pytest.raises(WeightsError, match="int8") as error:
        save_hf(to_int8(ours(CONFIGS["llama"])), tmp_path / "m")
    assert one_sentence(error.value) and not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_nothing(tmp_path):
    small = ours(ModelConfig(**{**SHAPE, "vocab_size": 256}))
    with pytest.raises(ValueError, match="object has no form"):
        save_hf(small, tmp_path / "m", tokenizer=object())
    assert not list(tmp_path.iterdir())


def test_loaded_weights_are_our_own(tmp_path):
    """No weight keeps a file mapped, or another tensor alive: the folder may go."""
    folder = save_hf(ours(CONFIGS["gpt2"]), tmp_path / "m")
    model = load_hf(folder)
    shutil.rmtree(folder)
    assert same_weights(model, ours(CONFIGS["gpt2"]))
    for weight in weights(model).values():
        assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes


# --- tokenizers ---------------------------------------------------------------------------------------------

TEXTS = [
    "To be, or not to be: that's the question.\n\n  1234 naïve café 人人 🙂\t\r\n end  ",
    "<|eos|>names<|endoftext|> of <|im_start|>specials<|im_end|>",
    "",
]
OWN = BPETokenizer.train(TEXTS[0] * 9, 300, ["<|eos|>", "<|user|>"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte", "own", "gpt2", "smollm2"])
def test_the_tokenizer_goes_along(name, tmp_path):
    own = {"byte": ByteTokenizer(["<|eos|>"]), "own": OWN}
    tokenizer = own[name] if name in own else load_tokenizer(name)
    model = ours(ModelConfig(**{**SHAPE, "n_layers": 1, "vocab_size": tokenizer.vocab_size}))
    folder = save_hf(model, tmp_path / "m", tokenizer)
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    here = load_tokenizer(str(folder))
    for text in TEXTS:
        wanted = tokenizer.encode(text, allow_specials=True)
        assert (
            theirs.encode(text, add_special_tokens=False) == wanted == here.encode(text, allow_specials=True)
        )
        assert here.encode(text) == tokenizer.encode(text)
        assert theirs.decode(wanted) == text
    assert theirs.eos_token_id == tokenizer.eos_id == here.eos_id
    assert here.specials == tokenizer.specials
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    if name == "smollm2":
        assert same_tokenizer(tokenizer, here)


def test_the_chat_template_goes_along(tmp_path):
    template = "{% for m in messages %}<|user|>{{ m.content }}<|eos|>{% endfor %}"
    model = ours(ModelConfig(**{**SHAPE, "n_layers": 1, "vocab_size": OWN.vocab_size}))
    folder = save_hf(model, tmp_path / "m", OWN, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "to be"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<|user|>to be<|eos|>"

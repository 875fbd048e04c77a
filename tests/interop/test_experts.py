"""Mixtral and Qwen3-MoE beyond what test_hf.py and test_gguf.py ask of every family: counts, refusals, hostile files, use.

What is common to all families (the same logits, both ways, in one file and in many) is there: `CONFIGS` has both.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.interop.models import CONFIGS, SHAPE, one_sentence, ours, same_weights

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import gguf
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tutorial_lib.cli.main import app
from tutorial_lib.core.rope import half_to_interleaved
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.interop import weights as interop_weights
from tutorial_lib.interop.checkpoint import load_model
from tutorial_lib.interop.gguf import load_gguf, save_gguf
from tutorial_lib.interop.gguf_file import GGUFFile
from tutorial_lib.interop.hf import load_hf, save_hf
from tutorial_lib.interop.hf_config import from_hf_config, to_hf_config
from tutorial_lib.interop.layout import lay_out, put_laid_out
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.interop.weights import WeightsError, outline
from tutorial_lib.kinds import kind_named
from tutorial_lib.moe.balance import balancing_loss, expert_load
from tutorial_lib.moe.model import MOE_PRESETS, MoEConfig
from tutorial_lib.quant.int8 import Int8Stack, put_int8, to_int8
from tutorial_lib.tools.accounting import count_parameters

IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
WITH_EXPERTS = {name: config for name, config in CONFIGS.items() if isinstance(config, MoEConfig)}
TOKENIZER = BPETokenizer.train("to be or not to be, that is the question, " * 9, 270, ["<|eos|>"])
SPEAKS = replace(CONFIGS["mixtral"], vocab_size=TOKENIZER.vocab_size)


# --- counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"), [("mixtral-8x7b", 46_702_792_704), ("qwen3-30b-a3b", 30_532_122_624)]
)
def test_presets_to_the_last_parameter(name, total):
    """As a model without memory, and as arithmetic."""
    model = outline(MOE_PRESETS[name])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert count_parameters(kind_named("MoETransformer").shape(MOE_PRESETS[name]))["total"] == total


# --- configurations -----------------------------------------------------------------------------------------

MIXTRAL = to_hf_config(CONFIGS["mixtral"])
QWEN3_MOE = to_hf_config(CONFIGS["qwen3_moe"])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"bias_update_speed": 0.001}, "bias_update_speed"),
        ({"norm": "layernorm"}, "norm"),
        ({"mlp": "gelu"}, "mlp"),
        ({"rope": False}, "rope"),
        ({"renormalize": False}, "renormalize"),
        ({"moe_every": 2}, "moe_every"),
        ({"dense_first": 1}, "dense_first"),
        ({"window": (8, None)}, "window"),
        ({"window": (8, None), "qk_norm": True}, "window"),
    ],
)
def test_what_neither_family_has_is_named(changes, field, tmp_path):
    config = MoEConfig(**SHAPE, **changes)
    for save in (lambda: to_hf_config(config), lambda: save_hf(ours(config), tmp_path / "m")):
        with pytest.raises(WeightsError, match=field) as error:
            save()
        assert one_sentence(error.value)
    assert not list(tmp_path.iterdir())


def test_how_it_was_trained_is_no_matter():
    trained = replace(CONFIGS["mixtral"], capacity_factor=1.25, dropout=0.1, z_loss_coef=0.5)
    assert to_hf_config(trained) == MIXTRAL


@pytest.mark.parametrize(
    ("about", "changes", "said"),
    [
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        (MIXTRAL, {"num_experts_per_tok": 1}, "renormalize must be false"),
        (MIXTRAL, {"num_experts_per_tok": 5}, "experts_per_token is 5, but there are only 4"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        (MIXTRAL, {"num_local_experts": None}, "does not say num_local_experts"),
        (MIXTRAL, {"num_local_experts": 1 << 31}, "num_local_experts is 2147483648, but it must be between 1 and 16,384"),
        (MIXTRAL, {"num_local_experts": True}, "num_local_experts is True"),
        (MIXTRAL, {"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1"),
        (MIXTRAL, {"router_aux_loss_coef": "x"}, "router_aux_loss_coef is 'x'"),
        (MIXTRAL, {"attention_bias": True}, "biases"),
        (MIXTRAL, {"attention_bias": True, "mlp_bias": True}, "bias must be false"),
        (MIXTRAL, {"model_type": "llama"}, "num_local_experts is 4"),
        (QWEN3_MOE, {"model_type": "qwen3"}, "num_experts is 6"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts is 0"),
        (QWEN3_MOE, {"num_local_experts": 7}, "num_experts is 6, and num_local_experts.* 7"),
        (QWEN3_MOE, {"moe_intermediate_size": 1 << 40}, "moe_intermediate_size is 1099511627776"),
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "renormalize must be false"),
        (QWEN3_MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (QWEN3_MOE, {"decoder_sparse_step": 4}, "none of the 3 layers has experts"),
        (QWEN3_MOE, {"mlp_only_layers": [0, 1, 2]}, "no layer is left with experts"),
        (QWEN3_MOE, {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\], but our Transformer"),
        (QWEN3_MOE, {"mlp_only_layers": ["0"]}, "must be a list of layers"),
        (QWEN3_MOE, {"mlp_only_layers": 7}, "must be a list of layers"),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": "x"}, "sliding_window is 'x'"),
    ],
)  # fmt: skip
def test_what_our_experts_have_not_is_named(about, changes, said):
    with pytest.raises(WeightsError, match=said) as error:
        from_hf_config({**about, **changes})
    assert one_sentence(error.value)


def test_the_number_of_experts_has_two_names():
    """Qwen writes `num_experts`, transformers 5 `num_local_experts`."""
    new = {**QWEN3_MOE, "num_local_experts": QWEN3_MOE["num_experts"]}
    del new["num_experts"]
    assert from_hf_config(new) == from_hf_config(QWEN3_MOE) == from_hf_config({**new, **QWEN3_MOE})


@pytest.mark.parametrize(
    ("step", "only", "has"),
    [(1, [0], [1, 2, 3, 4, 5]), (2, [0, 1], [3, 5]), (2, [1, 4], [3, 5]), (2, [2], [1, 3, 5]), (3, None, [2, 5]), (1, [0, 9], [1, 2, 3, 4, 5])],
)  # fmt: skip
def test_which_layers_have_experts(step, only, has):
    config = from_hf_config(
        {**QWEN3_MOE, "num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": only}
    )
    assert [layer for layer in range(6) if config.has_experts(layer)] == has


# --- tensors ------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.block_sparse_moe.experts.2"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{EXPERT}.w1.weight"), f"'{EXPERT}.w1.weight' is missing"),
        (lambda t: [t.pop(f"model.layers.{i}.block_sparse_moe.experts.3.w2.weight") for i in range(3)], "experts.3.w2.weight' is missing"),
        (lambda t: t.update({EXPERT.replace(".2", ".4") + ".w1.weight": torch.ones(80, 48)}), "experts.4.w1.weight' is not part"),
        (lambda t: t.update({EXPERT.replace(".2", ".-1") + ".w1.weight": torch.ones(80, 48)}), "experts.-1.w1.weight' is not part"),
        (lambda t: t.update({f"{EXPERT}.w2.weight": torch.ones(80, 48)}), r"2.w2.weight' has shape \(80, 48\), the model needs \(48, 80\)"),
        (lambda t: t.update({f"{EXPERT}.w2.weight": torch.ones(4, 48, 80)}), r"2.w2.weight' has shape \(4, 48, 80\)"),
        (lambda t: t.update({GATE: torch.ones(5, 48)}), r"gate.weight' has shape \(5, 48\), the model needs \(4, 48\)"),
        (lambda t: t.pop(GATE), f"'{GATE}' is missing"),
        (lambda t: t.update({f"{EXPERT}.w3.weight": torch.full((80, 48), torch.nan)}), "2.w3.weight' has numbers that are not finite"),
        (lambda t: t.update({f"{EXPERT}.w3.weight": torch.ones(80, 48, dtype=torch.int32)}), "2.w3.weight' holds int32"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(80, 48)}), "layers.1.mlp.up_proj.weight' is not part"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(change, said, tmp_path):
    folder = save_hf(ours(CONFIGS["mixtral"]), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=said) as error:
        load_hf(folder)
    assert one_sentence(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_local_experts": 16384}, "16,384 experts in each of 3 layers, but has"),
        ({"num_local_experts": 5}, "experts.4.w1.weight' is missing"),
        ({"num_local_experts": 3}, "experts.3.*is not part|gate.weight' has shape"),
        ({"num_hidden_layers": 4096}, "4,096 layers|more than there are"),
        ({"intermediate_size": 1 << 20}, "the model needs"),
    ],
)
def test_more_experts_than_the_file_has(changes, said, tmp_path):
    folder = save_hf(ours(CONFIGS["mixtral"]), tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({**MIXTRAL, **changes}))
    with pytest.raises(WeightsError, match=said) as error:
        load_hf(folder)
    assert one_sentence(error.value)


def test_a_model_that_is_not_its_configurations_is_not_written(tmp_path):
    for save in (save_hf, save_gguf):
        with pytest.raises(WeightsError, match="int8") as error:
            save(to_int8(ours(CONFIGS["qwen3_moe"])), tmp_path / "m.gguf")
        assert one_sentence(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_one_stack_is_in_the_making_at_a_time(name, tmp_path, monkeypatch):
    """Besides what the model has already, there is room for one tensor of the file, and for one stack of ours."""
    model = ours(WITH_EXPERTS[name])
    folder = save_hf(model, tmp_path / "m")
    given: list[int] = []
    seen: list[str] = []
    plain = interop_weights.room

    def count(shape, dtype):
        given.append(len(seen))
        return plain(shape, dtype)

    def put(model, name, weight):
        seen.append(name)
        interop_weights.put(model, name, weight)

    monkeypatch.setattr(interop_weights, "room", count)
    back = load_hf(folder, put=put)
    stacks = [place for place, own in enumerate(seen) if ".experts." in own]
    assert same_weights(back, model) and given == stacks  # room is asked for when its turn has come
    for parameter in back.parameters():
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes


# --- GGUF ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arch"), [("mixtral", "LLAMA"), ("qwen3_moe", "QWEN3MOE")])
def test_the_file_is_what_llama_cpp_makes_of_our_folder(name, arch, tmp_path):
    """With the package's own table of names; queries and keys turned for Mixtral, experts of a layer stacked."""
    model = ours(CONFIGS[name])
    config = model.config
    theirs = load_file(save_hf(model, tmp_path / "m") / "model.safetensors")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.n_layers)
    wanted: dict[str, Any] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for key, tensor in theirs.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", key):
            stacks[found[1] + found[3]][int(found[2])] = tensor
            continue
        for part, heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
            if name == "mixtral" and key.endswith(f"{part}.weight"):
                tensor = half_to_interleaved(tensor, heads)
        wanted[table.get_name(key, (".weight",))] = tensor
    for key, stack in stacks.items():
        wanted[table.get_name(key, (".weight",))] = torch.stack([stack[e] for e in range(config.n_experts)])
    file = GGUFFile(save_gguf(model, tmp_path / "m.gguf", kind="F32"))
    assert {f"{key}.weight".replace(".weight.weight", ".weight") for key in wanted} == file.tensors.keys()
    for key, tensor in wanted.items():
        assert torch.equal(file.read(key), tensor), key
    known = {gguf.TENSOR_NAMES[t].format(bid=0) for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[arch]]}
    assert {
        key.removesuffix(".weight").replace("blk.1.", "blk.0.").replace("blk.2.", "blk.0.")
        for key in file.tensors
    } <= known


def test_what_the_file_says(tmp_path):
    said = GGUFFile(save_gguf(ours(CONFIGS["mixtral"]), tmp_path / "m.gguf")).metadata
    assert said["general.architecture"] == "llama"
    assert (
        said["llama.expert_count"],
        said["llama.expert_used_count"],
        said["llama.feed_forward_length"],
    ) == (4, 2, 80)
    said = GGUFFile(save_gguf(ours(CONFIGS["qwen3_moe"]), tmp_path / "q.gguf")).metadata
    assert said["general.architecture"] == "qwen3moe"
    names = ("expert_count", "expert_used_count", "expert_feed_forward_length", "feed_forward_length")
    assert [said[f"qwen3moe.{name}"] for name in names] == [6, 3, 20, 80]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"renormalize": False}, "renormalize"),
        ({"moe_every": 2}, "moe_every"),
        ({"dense_first": 1}, "dense_first"),
        ({"window": 8}, "window"),
        ({"rope_scaling": {"kind": "llama3", "factor": 8.0}}, "rope_scaling"),
    ],
)
def test_what_llama_cpp_has_not_is_named(changes, field, tmp_path):
    with pytest.raises(WeightsError, match=field) as error:
        save_gguf(ours(replace(CONFIGS["qwen3_moe"], **changes)), tmp_path / "m.gguf")
    assert one_sentence(error.value) and not list(tmp_path.iterdir())


def changed_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """The file, with other fields and tensors; None: without."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("bad.gguf"), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        value = fields.get(key, field.contents())
        if not key.startswith(("GGUF.", "general.architecture")) and value is not None:
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else field.types[0]
            writer.add_key_value(key, value, kind)
    for name, numbers in ({t.name: t.data for t in reader.tensors} | tensors).items():
        if numbers is not None:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("bad.gguf")


STACK = "blk.1.ffn_gate_exps.weight"


@pytest.mark.parametrize(
    ("arch", "fields", "tensors", "said"),
    [
        ("llama", {"expert_count": 1 << 31}, {}, "expert_count is 2147483648, but it must be between 1 and 16,384"),
        ("llama", {"expert_count": 16384}, {}, r"ffn_gate_inp.weight' has shape \(4, 48\), the model needs \(16384, 48\)"),
        ("llama", {"expert_count": "four"}, {}, "expert_count is 'four'"),
        ("llama", {"expert_count": 0}, {}, "ffn_gate.weight' is missing"),
        ("llama", {"expert_count": None}, {}, "ffn_gate.weight' is missing"),
        ("llama", {"expert_used_count": None}, {}, "llama.expert_used_count"),
        ("llama", {"expert_used_count": 5}, {}, "experts_per_token is 5, but there are only 4"),
        ("llama", {"expert_used_count": 1}, {}, "renormalize must be false"),
        ("llama", {}, {STACK: torch.ones(5, 80, 48).numpy()}, r"has shape \(5, 80, 48\), the model needs \(4, 80, 48\)"),
        ("llama", {}, {STACK: torch.ones(48, 80, 4).numpy()}, r"has shape \(48, 80, 4\), the model needs \(4, 80, 48\)"),
        ("llama", {}, {STACK: torch.ones(80, 48).numpy()}, r"has shape \(80, 48\)"),
        ("llama", {}, {STACK: None}, f"'{STACK}' is missing"),
        ("llama", {}, {"blk.1.ffn_gate.0.weight": torch.ones(80, 48).numpy()}, "'blk.1.ffn_gate.0.weight' is not part"),
        ("llama", {}, {"blk.0.attn_q_norm.weight": torch.ones(12).numpy()}, "attn_q_norm.weight' is not part"),
        ("llama", {}, {"blk.0.attn_q.bias": torch.ones(48).numpy()}, "bias must be false"),
        ("qwen3moe", {"expert_feed_forward_length": None}, {}, "expert_feed_forward_length"),
        ("qwen3moe", {"expert_feed_forward_length": 1 << 31}, {}, "expert_feed_forward_length is 2147483648"),
        ("qwen3moe", {"expert_count": 0}, {}, "expert_count is 0"),
        ("qwen3moe", {}, {"blk.0.attn_q_norm.weight": None}, "attn_q_norm.weight' is missing"),
        ("qwen3moe", {}, {"blk.0.ffn_gate_inp_shexp.weight": torch.ones(48).numpy()}, "ffn_gate_inp_shexp.weight' is not part"),
    ],
)  # fmt: skip
def test_a_hostile_gguf_is_refused(arch, fields, tensors, said, tmp_path):
    good = save_gguf(
        ours(CONFIGS["mixtral" if arch == "llama" else "qwen3_moe"]), tmp_path / "m.gguf", kind="F32"
    )
    load_gguf(changed_gguf(good, {}, {}))
    bad = changed_gguf(good, {f"{arch}.{key}": value for key, value in fields.items()}, tensors)
    with pytest.raises(WeightsError, match=said) as error:
        load_gguf(bad)
    assert one_sentence(error.value)


# --- what keeps experts busy --------------------------------------------------------------------------------


def their_loss_and_ours(
    layers: list[torch.Tensor], k: int, real: torch.Tensor | None = None
) -> tuple[float, list[float]]:
    found = []
    for logits in layers:
        probs = logits.softmax(-1)
        load = expert_load(probs.topk(k, dim=-1).indices, logits.shape[1], real)
        found.append(float(balancing_loss(probs, load, real)))
    theirs = load_balancing_loss_func(
        tuple(layers), layers[0].shape[1], k, None if real is None else real[None]
    )
    return float(theirs), found


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_their_balancing_loss_is_ours_times_k(k, padded):
    """Their f are counts over tokens, which add up to k; ours are shares of all choices, which add up to 1."""
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(k)) + torch.tensor(
        [2.0, 1, 1, 0, 0, 0]
    )
    real = torch.arange(50) % 7 != 0 if padded else None
    theirs, (own,) = their_loss_and_ours([logits], k, real)
    assert theirs == pytest.approx(k * own, rel=1e-5) and own > 1.05


def test_pooled_over_layers_theirs_overlooks_what_ours_sees():
    """They count and average over all layers first: where one layer's favorites are another's orphans, it looks even.

    We have a loss for each layer, and add them up. With equal layers both say the same, but for k and the number of layers.
    """
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([4.0, 4, 0, 0])
    theirs, own = their_loss_and_ours([logits, logits], 2)
    assert theirs == pytest.approx(2 * own[0], rel=1e-5) and own[0] > 1.8
    theirs, own = their_loss_and_ours([logits, logits.flip(-1)], 2)
    assert theirs == pytest.approx(2, abs=0.05) and min(own) > 1.8


# --- in use -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_hf(ours(SPEAKS), tmp_path_factory.mktemp("mixtral") / "m", TOKENIZER)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_int8_stacks(name, tmp_path):
    """Each expert's matrix in eight bits, and the router as it was."""
    model = ours(WITH_EXPERTS[name])
    small = load_hf(save_hf(model, tmp_path / "m"), put=put_int8)
    assert torch.equal(small(IDS), to_int8(ours(WITH_EXPERTS[name]))(IDS))
    for block, own in zip(small.blocks, model.blocks, strict=True):
        if hasattr(own.mlp, "experts"):
            assert isinstance(block.mlp.experts.up, Int8Stack)
            assert torch.equal(block.mlp.router.weight, own.mlp.router.weight)
    assert 0 < (small(IDS) - model(IDS)).abs().mean() < 0.1 * model(IDS).std()


@torch.no_grad()
def test_the_order_for_writing_leaves_stacks_alone(folder):
    model, plain = load_hf(folder, put=put_laid_out), load_hf(folder)
    for laid_out in (model, lay_out(load_hf(folder))):
        assert laid_out.blocks[0].attn.q.weight.stride() != plain.blocks[0].attn.q.weight.stride()
        for leaf in ("gate", "up", "down"):
            assert getattr(laid_out.blocks[0].mlp.experts, leaf).is_contiguous()
        assert laid_out.blocks[0].mlp.router.weight.is_contiguous()
        torch.testing.assert_close(laid_out(IDS), plain(IDS))


@pytest.mark.parametrize("form", ["folder", "gguf", "ckpt"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_every_door_and_every_dtype(form, dtype, folder, tmp_path):
    path = folder
    if form == "gguf":
        path = save_gguf(ours(SPEAKS), tmp_path / "m.gguf", TOKENIZER, "F32")
    elif form == "ckpt":
        from tutorial_lib.interop.checkpoint import save_model

        path = save_model(tmp_path / "m.ckpt", ours(SPEAKS), {"tokenizer": str(folder / "tokenizer.json")})
    for to_write in (False, True):
        found = open_pretrained(path, dtype, to_write=to_write)
        stack = found.model.blocks[1].mlp.experts.up
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        assert isinstance(stack, Int8Stack) == (dtype == "int8") and stack[0].dtype == wanted
        with torch.no_grad():
            off = (found.model(IDS).float() - ours(SPEAKS)(IDS)).abs().median()
        assert off < {"fp32": 1e-5, "fp16": 0.01}.get(dtype, 0.1)


def run(*words: str | Path) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


def test_from_a_mixtral_to_a_run_of_ours_and_out_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(
        "To be, or not to be, that is the question. Whether 'tis nobler in the mind to suffer.\n" * 60
    )
    how = ["train.steps=6", "train.batch_size=4", "train.seq_len=16", "train.warmup_steps=1", "train.lr=1e-3"]
    how += ["log.tensorboard=false", "log.name=tuned", f"data.dataset={text}"]
    run("train", f"train.init_from={folder}", *how)
    model, _ = load_model("runs/tuned/latest.ckpt")
    assert model.config == load_hf(folder).config and not same_weights(model, load_hf(folder))
    assert json.loads(run("eval", "--ckpt", "runs/tuned/latest.ckpt", "--json").stdout)["loss"] > 0
    run("export", "out", "--ckpt", "runs/tuned/latest.ckpt")
    run("export", "out.gguf", "--ckpt", "runs/tuned/latest.ckpt", "--kind", "F32")
    words = ["--prompt", "To be", "--max-new-tokens", "8", "--temperature", "0"]
    written = {run("generate", "--model", name, *words).stdout for name in ("out", "out.gguf")}
    written.add(run("generate", "--ckpt", "runs/tuned/latest.ckpt", *words).stdout)
    assert len(written) == 1 and len(written.pop()) > len("To be")

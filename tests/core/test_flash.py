"""FlashAttention in plain torch equals the plain formula, never holds the matrix, and the switch of kernels holds."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tutorial_lib.core import kernels
from tutorial_lib.core.flash import attend_in_tiles, flash_attention, online_softmax_step, tiles
from tutorial_lib.core.kernels import KERNELS, attention_kernel, available_kernels
from tutorial_lib.core.model import ModelConfig, Transformer

INF = float("inf")
lengths, blocks = st.integers(1, 40), st.integers(1, 48)


def make(T: int, K: int, lead: tuple[int, ...] = (2, 3), C: int = 8, C_v: int = 5, **how) -> list[Tensor]:
    torch.manual_seed(T * 100 + K)
    return [torch.randn(*lead, n, c, **how) for n, c in ((T, C), (K, C), (K, C_v))]


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    T, K = q.shape[-2], k.shape[-2]
    mask = torch.ones(T, K, dtype=torch.bool).tril(K - T) if causal else None
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# ── core.flash ───────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(T=lengths, past=st.integers(0, 30), causal=st.booleans(), block_q=blocks, block_k=blocks)
def test_forward_and_gradients_equal_torchs(T, past, causal, block_q, block_k):
    q, k, v = (x.requires_grad_() for x in make(T, T + past))
    ours, theirs = flash_attention(q, k, v, causal, None, block_q, block_k), reference(q, k, v, causal)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    grad = torch.randn_like(ours)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(T=lengths, K=lengths, block_q=blocks, block_k=blocks)
def test_the_log_sum_exp_and_fewer_keys_than_queries(T, K, block_q, block_k):
    q, k, v = make(T, K, dtype=torch.float64)
    out, lse = attend_in_tiles(q, k, v, scale=0.3, block_q=block_q, block_k=block_k)
    torch.testing.assert_close(out, reference(q, k, v, False, 0.3))
    torch.testing.assert_close(lse, (q @ k.mT * 0.3).logsumexp(-1))


@pytest.mark.parametrize("lead", [(), (2,), (2, 1, 2)], ids=str)
def test_any_leading_dimensions_and_layouts(lead):
    q, k, v = (x.mT.contiguous().mT for x in make(9, 12, lead))  # not contiguous
    torch.testing.assert_close(flash_attention(q, k, v, True, None, 4, 5), reference(q, k, v, True))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_the_slopes_of_the_output(causal):
    q, k, v = (x.requires_grad_() for x in make(5, 7, (2,), C=3, C_v=2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, causal, 0.7, 2, 3), (q, k, v))


@settings(max_examples=60, deadline=None)
@given(T=lengths, past=st.integers(0, 30), causal=st.booleans(), block_q=blocks, block_k=blocks)
def test_tiles_cover_all_that_is_visible_once_and_nothing_wholly_in_the_future(
    T, past, causal, block_q, block_k
):
    K = T + past
    visible = torch.ones(T, K, dtype=torch.bool).tril(past) if causal else torch.ones(T, K, dtype=torch.bool)
    visits = torch.zeros(T, K)
    for rows, all_columns in tiles(T, K, causal, block_q, block_k):
        for columns in all_columns:
            visits[rows, columns] += 1
            assert visible[rows, columns].any(), "a tile wholly in the future was visited"
    assert (visits <= 1).all() and (visits[visible] == 1).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores_stay_finite(size):
    q, k, v = make(20, 20, dtype=torch.float32)
    k = k.sign() * abs(size)
    q = q.sign() * (1 if size > 0 else -1)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = flash_attention(q, k, v, True, 1.0, 8, 4)
    torch.testing.assert_close(out, reference(q, k, v, True, 1.0), atol=1e-4, rtol=1e-4)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_sixteen_bits_are_summed_in_fp32():
    wide = make(64, 64, C=32, C_v=32)
    q, k, v = (x.bfloat16() for x in wide)
    out = flash_attention(q, k, v, True, None, 8, 8)
    exact = reference(*(x.float() for x in (q, k, v)), True)
    assert out.dtype == torch.bfloat16
    assert (
        torch.equal(out, exact.bfloat16()) or (out.float() - exact).abs().max() < 0.01
    )  # one rounding, at the end


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("T, K", [(512, 512), (200, 777)])
def test_no_tensor_is_larger_than_a_tile_or_the_inputs(T, K):
    q, k, v = (x.requires_grad_() for x in make(T, K, (1,), 16, 16))
    with Largest() as seen:
        flash_attention(q, k, v, True, None, 32, 64).sum().backward()
    assert seen.numel <= max(32 * 64, 16 * K) < T * K
    with Largest() as seen:  # the hook does see such a matrix
        reference(q, k, v, True).sum().backward()
    assert seen.numel >= T * K


def test_what_is_kept_for_the_backward_is_linear_in_T():
    q, k, v = (x.requires_grad_() for x in make(256, 256, (1,), 16, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        flash_attention(q, k, v, True)
    assert sum(kept) == 4 * 256 * 16 + 256  # q, k, v, out, and a number for each query


def test_a_step_repairs_the_past():
    m, l, acc = torch.full((1, 1), -INF), torch.zeros(1, 1), torch.zeros(1, 1)
    for score, value in ((1.0, 10.0), (3.0, 20.0), (2.0, 30.0)):
        m, l, acc = online_softmax_step(m, l, acc, torch.tensor([[score]]), torch.tensor([[value]]))
    expected = torch.tensor([1.0, 3.0, 2.0]).softmax(0) @ torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close((acc / l).item(), expected.item())


@pytest.mark.parametrize(
    "shapes, how, words",
    [
        (((3, 4), (3, 5), (3, 4)), {}, "must be"),
        (((3, 4), (3, 4), (2, 4)), {}, "must be"),
        (((2, 3, 4), (1, 3, 4), (1, 3, 4)), {}, "must be"),
        (((3, 4), (0, 4), (0, 4)), {}, "no keys"),
        (((3, 4), (2, 4), (2, 4)), {"causal": True}, "at least as many keys"),
        (((3, 4), (3, 4), (3, 4)), {"block_q": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_said(shapes, how, words):
    with pytest.raises(ValueError, match=words):
        flash_attention(*(torch.zeros(shape) for shape in shapes), **how)


# ── core.kernels ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_kernel_that_is_here_gives_the_same_model():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(d_model=32, n_heads=4, n_kv_heads=2, n_layers=2))
    ids = torch.randint(256, (2, 70))
    expected = model(ids)
    here = [name for name, answer in available_kernels("cpu", torch.float32).items() if answer == "yes"]
    assert {"auto", "math", "flash", "tiled"} <= set(here)
    for name in here:
        model.zero_grad()
        with attention_kernel(name):
            logits = model(ids)
            logits.logsumexp(-1).mean().backward()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_cache_works_under_the_tiled_kernel():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(d_model=32, n_heads=4, n_kv_heads=2, n_layers=2)).eval()
    ids = torch.randint(256, (2, 20))
    with torch.no_grad(), attention_kernel("tiled"):
        cache = model.new_cache(2, 20)
        parts = [
            model(ids[:, :12], cache=cache),
            *(model(ids[:, t : t + 1], cache=cache) for t in range(12, 20)),
        ]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=1e-4)


def test_the_kernel_really_changes_and_comes_back():
    calls = []

    def spy(q, k, v, dropout_p, causal, scale):
        calls.append((causal, scale))
        return q * 0

    q = torch.randn(1, 2, 8, 4)
    before = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with kernels._Redirect(kernels._through("tiled", spy)):
        assert not F.scaled_dot_product_attention(q, q, q, is_causal=True).any()
        with attention_kernel("math"):  # the innermost counts
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, is_causal=True), before)
        with attention_kernel("auto"):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, is_causal=True), before)
    assert calls == [(True, 0.5)]
    assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), before)


@pytest.mark.parametrize(
    "name, near", [("Flash", "flash"), ("flashatn2", "flash_attn2"), ("xformer", "xformers")]
)
def test_an_unknown_kernel_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        with attention_kernel(name):
            pass


@pytest.mark.parametrize("name, pip", [("xformers", "xformers"), ("flash_attn2", "flash-attn")])
def test_a_package_that_is_not_there(name, pip, monkeypatch):
    for module in ("xformers", "xformers.ops", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {pip}") as caught:
        with attention_kernel(name):
            pass
    assert "\n" not in str(caught.value)
    assert f"pip install {pip}" in available_kernels("cpu", torch.float32)[name]


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_kernels_for_gpus_say_so_on_a_cpu(name):
    q = torch.zeros(1, 1, 4, 4)
    with attention_kernel(name), pytest.raises(RuntimeError, match="needs a GPU"):
        F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize(
    "how, words",
    [
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "takes no mask"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"keys": 6, "is_causal": True}, "4 queries and 6 keys"),
        ({"key_heads": 1, "enable_gqa": True}, "repeat them"),
    ],
    ids=["mask", "dropout", "T is not K", "grouped"],
)
def test_what_a_kernel_cannot_serve_is_refused_in_one_sentence(how, words):
    how = dict(how)
    kv = torch.zeros(1, how.pop("key_heads", 2), how.pop("keys", 4), 8)
    with attention_kernel("tiled"), pytest.raises(RuntimeError, match=words) as caught:
        F.scaled_dot_product_attention(torch.zeros(1, 2, 4, 8), kv, kv, **how)
    assert "\n" not in str(caught.value)


def test_no_device_is_a_reason_and_not_an_error():
    answers = available_kernels("cuda:99", torch.bfloat16)
    assert set(answers) == set(KERNELS) and "yes" not in answers.values()


def test_autocast_reaches_the_tiled_kernel():
    q = torch.randn(1, 2, 16, 8)
    with attention_kernel("tiled"), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, q, q, is_causal=True).dtype == torch.bfloat16


# Stand-ins with the documented interfaces: (B, T, H, C), and causal in each package's own way.


def fake_flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert q.dtype in (torch.float16, torch.bfloat16) and not dropout_p
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return reference(q, k, v, causal, softmax_scale).transpose(1, 2)


class LowerTriangularMask:
    pass


def fake_memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return reference(q, k, v, attn_bias is not None, scale).transpose(1, 2)


FAKES = {
    "flash_attn2": SimpleNamespace(flash_attn_func=fake_flash_attn_func),
    "xformers": SimpleNamespace(
        memory_efficient_attention=fake_memory_efficient_attention, LowerTriangularMask=LowerTriangularMask
    ),
}


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("causal", [False, True])
def test_adapters_map_layout_causal_and_scale(name, causal):
    q, k, v = (x.bfloat16() for x in make(6, 6, (2, 3), 8, 8))  # H ≠ T: a swap would show
    out = kernels._ADAPTERS[name](FAKES[name], q, k, v, 0.0, causal, 0.3)
    torch.testing.assert_close(out, reference(q, k, v, causal, 0.3))


@pytest.mark.parametrize("name, module", [("xformers", "xformers.ops"), ("flash_attn2", "flash_attn")])
def test_a_package_is_used_where_it_can_be_and_refuses_elsewhere(name, module, monkeypatch):
    stand_in = ModuleType(module)
    vars(stand_in).update(vars(FAKES[name]))
    monkeypatch.setitem(sys.modules, module.split(".")[0], stand_in)
    monkeypatch.setitem(sys.modules, module, stand_in)
    q = torch.randn(1, 2, 5, 8)
    with attention_kernel(name):
        with pytest.raises(RuntimeError, match="needs a GPU"):
            F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(RuntimeError, match=r"\(B, H, T, C\)"):
            F.scaled_dot_product_attention(q[0], q[0], q[0])
        far = q.to("meta", torch.bfloat16)  # a device that is no CPU, and computes shapes alone
        assert F.scaled_dot_product_attention(far, far, far).shape == q.shape
        if name == "flash_attn2":
            with pytest.raises(RuntimeError, match="fp16 or bf16"):
                F.scaled_dot_product_attention(far.float(), far.float(), far.float())


@pytest.mark.slow
def test_compiled_models_see_the_switch():
    """Each kernel gets a graph of its own, backward included; no code is generated."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Transformer(ModelConfig(d_model=32, n_heads=2, n_layers=1))
    ids = torch.randint(256, (1, 70))
    expected = model(ids)
    expected.logsumexp(-1).sum().backward()
    grad = model.tokens.weight.grad.clone()
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    run = torch.compile(model, backend=backend, fullgraph=True)
    for name, so_far in (("auto", 1), ("tiled", 2), ("math", 3), ("tiled", 3)):
        model.zero_grad()
        with attention_kernel(name):
            logits = run(ids)
            logits.logsumexp(-1).sum().backward()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.tokens.weight.grad, grad, atol=1e-4, rtol=1e-3)
        assert len(graphs) == so_far
    torch.compiler.reset()

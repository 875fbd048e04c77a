"""Lesson 4.2: pieces equal the whole, the order of a mixed-precision step, and blocks that forget."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.train.accumulate import accumulate_gradients, split_batch
from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss
from tutorial_lib.train.objective import NextToken
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.recompute import recompute_blocks

V, T = 17, 6


def build(dropout: float = 0.0, n_layers: int = 2, **changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(V, T, 16, 2, n_layers=n_layers, dropout=dropout, **changes))


def draw(rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (2, rows, T), generator=torch.Generator().manual_seed(seed))
    return ids[0], ids[1]


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def in_pieces(model: nn.Module, micro_batches, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    means = accumulate_gradients(model, micro_batches, precision)
    return means["loss"], gradient(model)


def whole(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = lm_loss(model(inputs), labels)
    loss.backward()
    return loss.detach(), gradient(model)


# --- accumulation -------------------------------------------------------------------------------------------

# For each row, how many of its labels count, from none to all; at least one in the batch.
ragged = st.lists(st.integers(0, T), min_size=1, max_size=9).filter(any)


def ragged_batch(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    inputs, labels = draw(len(counts), seed)
    order = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return inputs, labels.masked_fill(order >= torch.tensor(counts)[:, None], IGNORE_INDEX)


@settings(max_examples=30)
@given(ragged, st.integers(1, 9), st.integers(0, 1000))
def test_pieces_equal_the_whole_with_ragged_labels(counts, size, seed):
    model, (inputs, labels) = build(), ragged_batch(counts, seed)
    loss, got = in_pieces(model, split_batch((inputs, labels), size))
    wanted_loss, wanted = whole(model, inputs, labels)
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_in_double_precision_it_is_exact_to_twelve_digits(k):
    model = build().double()
    inputs, labels = ragged_batch([6, 0, 1, 3, 0, 0, 5, 2], seed=3)
    pieces = list(zip(inputs.chunk(k), labels.chunk(k), strict=True))
    assert k < 8 or any((piece == IGNORE_INDEX).all() for _, piece in pieces)
    _, got = in_pieces(model, pieces)
    _, wanted = whole(model, inputs, labels)
    # The count and the loss's divisor are fp32 integers, which are exact.
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_the_mean_of_means_is_another_gradient():
    model, (inputs, labels) = build(), ragged_batch([1, 6, 0, 2], seed=1)
    _, wanted = whole(model, inputs, labels)
    model.zero_grad()
    for piece in split_batch((inputs, labels), 2):
        (lm_loss(model(piece[0]), piece[1]) / 2).backward()
    assert (gradient(model) - wanted).norm() > 0.05 * wanted.norm()


def test_micro_batches_of_different_lengths():
    """Pieces need not have one shape: the gradient is that of the sum over all labels."""
    model = build()
    pieces = [
        tuple(part[:, :t] for part in draw(rows, seed)) for rows, t, seed in ((1, 6, 1), (3, 2, 2), (2, 4, 3))
    ]
    _, got = in_pieces(model, pieces)
    model.zero_grad()
    total = sum(NextToken().loss(model, piece)[0] for piece in pieces)
    (total / sum(labels.numel() for _, labels in pieces)).backward()
    torch.testing.assert_close(got, gradient(model), rtol=1e-5, atol=1e-7)


def test_gradients_are_added_and_the_loss_has_no_graph():
    model, batch = build(), draw()
    loss, once = in_pieces(model, [batch])
    assert not loss.requires_grad and loss.ndim == 0
    accumulate_gradients(model, [batch])
    torch.testing.assert_close(gradient(model), 2 * once)


class Penalized(NextToken):
    """Three times the loss; a metric for each thing worth knowing, the plain loss among them."""

    def loss(self, model, batch):
        plain, _ = super().loss(model, batch)
        inputs, labels = batch
        right = (model(inputs).argmax(-1) == labels).sum()
        return 3 * plain, {"loss": plain, "accuracy": right}


def test_another_objective_plugs_in_and_reports_its_plain_loss():
    model, (inputs, labels) = build(), draw()
    wanted_loss, wanted = whole(model, inputs, labels)
    model.zero_grad()
    means = accumulate_gradients(model, split_batch((inputs, labels), 1), objective=Penalized())
    torch.testing.assert_close(gradient(model), 3 * wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(means["loss"], wanted_loss)
    accuracy = (model(inputs).argmax(-1) == labels).float().mean()
    torch.testing.assert_close(means["accuracy"], accuracy)
    assert list(means) == ["objective", "loss", "accuracy"]
    torch.testing.assert_close(means["objective"], 3 * wanted_loss)


class PerRow(NextToken):
    """The loss counts labels; two metrics count rows, and only those that end in an even token."""

    def loss(self, model, batch):
        plain, _ = super().loss(model, batch)
        even = batch[1][:, -1] % 2 == 0
        return plain, {
            "rows": (even.new_ones(len(even)).sum(), len(even)),
            "last": (batch[1][even, -1].sum(), even.sum()),
        }


@pytest.mark.parametrize("size", [1, 3, None])
def test_a_metric_with_a_count_of_its_own_is_a_mean_over_that(size):
    model, (inputs, labels) = build(), draw(8)
    means = accumulate_gradients(model, split_batch((inputs, labels), size), objective=PerRow())
    last = labels[:, -1][labels[:, -1] % 2 == 0].float()
    assert means["rows"] == 1 and 0 < len(last) < 8
    torch.testing.assert_close(means["last"], last.mean())


def test_a_metric_that_is_not_one_number_is_named():
    class Vector(NextToken):
        def loss(self, model, batch):
            return super().loss(model, batch)[0], {"load": torch.zeros(4)}

    with pytest.raises(ValueError, match=r"metric 'load' has shape \(4,\)"):
        accumulate_gradients(build(), [draw()], objective=Vector())


def test_a_process_without_rows_takes_part_with_none():
    inputs, labels = draw()
    assert [len(x) for x, _ in split_batch((inputs[:0], labels[:0]))] == [0]
    assert [len(x) for x, _ in split_batch((inputs[:0], labels[:0]), 2)] == [0]


def test_nothing_to_learn_from_is_an_error_and_touches_nothing():
    model, (inputs, labels) = build(), draw()
    for pieces in ([(inputs, torch.full_like(labels, IGNORE_INDEX))], []):
        with pytest.raises(ValueError, match="-100"):
            accumulate_gradients(model, pieces)
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_is_cut_into_rows_and_put_together_again():
    inputs, labels = draw(5)
    assert [len(x) for x, _ in split_batch((inputs, labels), 2)] == [2, 2, 1]
    assert [len(x) for x, _ in split_batch((inputs, labels))] == [5]
    assert [len(x) for x, _ in split_batch((inputs, labels), 100)] == [5]
    torch.testing.assert_close(torch.cat([y for _, y in split_batch((inputs, labels), 2)]), labels)
    with pytest.raises(ValueError, match="0 rows"):
        split_batch((inputs, labels), 0)


def test_a_batch_may_have_any_number_of_tensors_with_the_same_rows():
    batch = (torch.arange(5), torch.rand(5, 2), torch.rand(5, 3, 4), torch.zeros(5, dtype=torch.bool))
    pieces = split_batch(batch, 2)
    assert [len(piece) for piece in pieces] == [4, 4, 4]
    for part, again in zip(batch, zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(again), part)
    with pytest.raises(ValueError, match=r"\[5, 4\] rows"):
        split_batch((torch.rand(5), torch.rand(4)), 2)


# --- precision ----------------------------------------------------------------------------------------------

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("dtype", FORMATS)
def test_forward_in_16_bits_weights_and_gradients_in_32(dtype):
    model, precision = build(), Precision("cpu", dtype)
    with precision.autocast():
        logits = model(draw()[0])
    assert logits.dtype == dtype
    loss, got = in_pieces(model, split_batch(draw(), 2), precision)
    _, wanted = whole(model, *draw())
    got = got / precision.scaler.get_scale()
    assert loss.dtype == got.dtype == torch.float32
    assert (got - wanted).norm() < {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[
        dtype
    ] * wanted.norm()


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_norm_and_the_step_are_those_of_the_true_gradients(dtype):
    """Unscale comes before clip: SGD with rate 1 moves by the limit, and by no more."""
    model, precision = build(), Precision("cpu", dtype, init_scale=2.0**12)
    true_norm = whole(model, *draw())[1].norm()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), weights(model)
    in_pieces(model, [draw()], precision)
    norm = precision.step(optimizer, model.parameters(), grad_clip=0.25)
    torch.testing.assert_close(norm, true_norm, rtol=0.02, atol=0)
    assert norm > 0.25
    torch.testing.assert_close((weights(model) - before).norm(), torch.tensor(0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflowing_step_is_skipped_and_halves_the_scale(fused):
    model, precision = build(), Precision("cpu", torch.float16, init_scale=2.0**40)
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), weights(model)
    in_pieces(model, [draw()], precision)
    norm = precision.step(optimizer, model.parameters(), grad_clip=1.0)
    assert not norm.isfinite()
    assert torch.equal(weights(model), before)
    assert precision.scaler.get_scale() == 2.0**39
    while precision.scaler.get_scale() > 2.0**8:  # it finds its way down
        in_pieces(model, [draw()], precision)
        if precision.step(optimizer, model.parameters(), grad_clip=1.0).isfinite():
            break
    assert not torch.equal(weights(model), before) and weights(model).isfinite().all()


def test_the_scale_grows_after_good_steps_and_survives_a_round_trip():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    precision = Precision("cpu", torch.float16, init_scale=64.0, growth_interval=3)
    scales = []
    for step in range(4):
        in_pieces(model, [draw(seed=step)], precision)
        precision.step(optimizer, model.parameters())
        scales.append(precision.scaler.get_scale())
    assert scales == [64, 64, 128, 128]
    resumed = Precision("cpu", torch.float16, init_scale=2.0, growth_interval=3)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.state_dict() == precision.state_dict()
    for p in (precision, resumed):  # the counter of good steps has come along: two more to the next doubling
        twin = copy.deepcopy(model)
        twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        for step in range(2):
            in_pieces(twin, [draw(seed=step)], p)
            p.step(twin_optimizer, twin.parameters())
        assert p.scaler.get_scale() == 256


def test_states_of_other_formats_do_not_mix_in():
    saved = Precision("cpu", torch.float16, init_scale=8.0).state_dict()
    assert Precision().state_dict() == Precision("cpu", torch.bfloat16).state_dict() == {}
    for dtype in (torch.float32, torch.bfloat16):
        Precision("cpu", dtype).load_state_dict(saved)
    fp16 = Precision("cpu", torch.float16, init_scale=4.0)
    fp16.load_state_dict({})
    assert fp16.scaler.get_scale() == 4.0


def test_without_a_limit_nothing_is_clipped():
    model, precision = build(), Precision()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), weights(model)
    _, wanted = in_pieces(model, [draw()], precision)
    wanted = wanted.clone()
    norm = precision.step(optimizer, iter(list(model.parameters())))
    torch.testing.assert_close(norm, wanted.norm())
    torch.testing.assert_close(before - weights(model), wanted, rtol=1e-4, atol=1e-6)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="float64"):
        Precision("cpu", torch.float64)


# --- recomputation ------------------------------------------------------------------------------------------


def kept_bytes(model: nn.Module, inputs: Tensor, labels: Tensor, seed: int = 0) -> tuple[int, Tensor]:
    """Bytes that autograd keeps from forward to backward, parameters not counted; and the gradient."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = lm_loss(model(inputs), labels)
    n_bytes = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return n_bytes, gradient(model)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_gives_the_same_gradients_from_fewer_bytes(dropout, dtype):
    model = build(dropout, n_layers=4)
    inputs, labels = draw(8)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        all_bytes, wanted = kept_bytes(model, inputs, labels)
        names = list(model.state_dict())
        recompute_blocks(model.blocks[::2])
        half_bytes, half = kept_bytes(model, inputs, labels)
        recompute_blocks(model.blocks)
        few_bytes, got = kept_bytes(model, inputs, labels)
    assert torch.equal(half, wanted) and torch.equal(got, wanted)
    assert few_bytes < 0.5 * all_bytes and few_bytes < half_bytes < all_bytes
    assert (
        list(model.state_dict()) == names == [name for name, _ in model.named_parameters()] + ["head.weight"]
    )


def test_wrapped_twice_computes_twice_and_not_three_times():
    model, calls = build(), []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        recompute_blocks(model.blocks)
    lm_loss(model(draw()[0]), draw()[1]).backward()
    assert len(calls) == 2
    with torch.no_grad():
        calls.clear()
        model(draw()[0])
    assert len(calls) == 1


def test_a_block_whose_forward_is_another_partial_is_wrapped_too():
    import functools

    model, plain = build(), build()
    for block in model.blocks:
        block.forward = functools.partial(lambda forward, *args: forward(*args), block.forward)
    recompute_blocks(model.blocks)
    few, got = kept_bytes(model, *draw())
    many, wanted = kept_bytes(plain, *draw())
    assert few < many and torch.equal(got, wanted)


def test_a_copy_of_a_recomputing_model_is_its_own():
    """An average of the weights (EMA) copies the model."""
    model = build()
    recompute_blocks(model.blocks)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.zero_()
    _, got = kept_bytes(twin, *draw())
    _, wanted = kept_bytes(build(), *draw())
    assert torch.equal(got, wanted)


def test_everything_at_once():
    """fp16, recomputation, dropout off, ragged pieces: close to plain fp32 on the whole."""
    model = build()
    inputs, labels = ragged_batch([6, 0, 1, 3], seed=2)
    _, wanted = whole(model, inputs, labels)
    recompute_blocks(model.blocks)
    precision = Precision("cpu", torch.float16, init_scale=256.0)
    _, got = in_pieces(model, split_batch((inputs, labels), 1), precision)
    assert (got / 256 - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.slow
def test_recomputation_and_compile_work_together():
    """The graph is captured whole and differentiated (aot_eager), without a compiler for C++."""
    pytest.importorskip("torch._dynamo")
    model, plain = build(), build()
    recompute_blocks(model.blocks)
    model.compile(backend="aot_eager")
    _, got = kept_bytes(model, *draw())
    _, wanted = kept_bytes(plain, *draw())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)

"""Packing is exactly padding, and faster; what a batch's labels are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.moe.model import MoEConfig, MoETransformer
from tutorial_lib.sft.batches import PackedRows, PaddedRows, document_mask, first_fit
from tutorial_lib.sft.chat_format import grow_vocabulary
from tutorial_lib.sft.examples import Example
from tutorial_lib.sft.objective import Answers
from tutorial_lib.train.losses import IGNORE_INDEX, lm_loss

LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=12)


def some_examples(lengths: list[int], seed: int = 0, vocab: int = 31) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in lengths:
        ids = torch.randint(vocab, (n,), generator=generator).tolist()
        learned = (torch.rand(n, generator=generator) < 0.6).tolist()
        learned[-1] = True  # the end
        found.append(Example(tuple(ids), tuple(learned)))
    return found


def a_model(seed: int = 0, **settings) -> Transformer:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 31,
        "max_seq_len": 64,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
    } | settings
    model = (
        MoETransformer(MoEConfig(**shape)) if "n_experts" in settings else Transformer(ModelConfig(**shape))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def all_of(model, batch) -> tuple[float, int, float, dict[str, torch.Tensor]]:
    objective = Answers()
    model.zero_grad()
    loss, metrics = objective.loss(model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), int(objective.count(batch)), float(metrics["accuracy"]), gradients


@pytest.mark.parametrize(
    "settings_of",
    [
        {},
        {"rope": False},
        {"qk_norm": True, "window": 5},
        {"norm": "layernorm", "mlp": "gelu", "bias": True},
        {"n_experts": 4},
    ],
)
def test_packed_rows_are_padded_rows_in_loss_and_gradients(settings_of):
    examples, model = some_examples([7, 3, 20, 11, 2, 9, 16, 5, 5]), a_model(**settings_of)
    padded, packed = PaddedRows(examples), PackedRows(examples, 24)
    assert len(packed) < len(padded)
    loss, count, right, gradients = all_of(model, padded.batch(range(len(padded))))
    loss2, count2, right2, gradients2 = all_of(model, packed.batch(range(len(packed))))
    assert count == count2 == sum(example.n_learned for example in examples) and right == right2
    assert loss2 == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((gradient - gradients2[name]).abs().max() / scale) < 1e-4, name


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(19, 40))
def test_nothing_is_lost_in_packing(lengths, room):
    """Every example stands in one row, whole; each position says how far its example is; the rest is filling."""
    examples = some_examples(lengths)
    packed = PackedRows(examples, room)
    assert sorted(i for row in packed.rows for i in row) == list(range(len(examples)))
    inputs, labels, positions = packed.batch(range(len(packed)))
    assert inputs.shape == labels.shape == positions.shape == (len(packed), room)
    for b, row in enumerate(packed.rows):
        at = 0
        for which in row:
            example = examples[which]
            n = len(example) - 1
            assert inputs[b, at : at + n].tolist() == list(example.ids[:-1])
            expected = [
                i if one else IGNORE_INDEX
                for i, one in zip(example.ids[1:], example.learned[1:], strict=True)
            ]
            assert labels[b, at : at + n].tolist() == expected
            assert positions[b, at : at + n].tolist() == list(range(n))
            at += n
        assert (positions[b, at:] == -1).all() and (labels[b, at:] == IGNORE_INDEX).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 50))
def test_first_fit_keeps_its_promise(lengths, room):
    """No row is too full, and no more than 11/9 of the fewest rows (and one) are used, whatever the fewest are."""
    rows = first_fit(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= room for row in rows)
    slow: list[int] = []  # the same, looked for one by one
    for length in sorted(lengths, reverse=True):
        at = next((r for r, used in enumerate(slow) if used + length <= room), None)
        if at is None:
            slow.append(length)
        else:
            slow[at] += length
    assert [sum(lengths[i] for i in row) for row in rows] == slow


def test_an_example_that_does_not_fit_is_one_sentence():
    with pytest.raises(ValueError, match="an example has 21 ids, but a row of 19 holds 20 at most"):
        PackedRows(some_examples([5, 21]), 19)


def test_documents_do_not_see_each_other():
    mask = document_mask(torch.tensor([[0, 1, 2, 0, 1, -1]]))[0, 0]
    assert mask[:3, :3].all() and mask[3:5, 3:5].all()
    assert not mask[:3, 3:].any() and not mask[3:, :3].any()


def test_what_stands_in_another_example_changes_nothing():
    """The probe against rows that leak: change the first example, and the second one's logits stay, to the bit."""
    model, examples = a_model().eval(), some_examples([8, 9])
    packed = PackedRows(examples, 20)
    inputs, _, positions = packed.batch([0])
    first = len(examples[packed.rows[0][0]]) - 1
    other = inputs.clone()
    other[0, :first] = (other[0, :first] + 1) % 31
    with torch.no_grad():
        before, after = (model(ids, positions, mask=document_mask(positions)) for ids in (inputs, other))
        leaks = [model(ids, positions) for ids in (inputs, other)]
    assert torch.equal(before[0, first:16], after[0, first:16])
    assert not torch.allclose(leaks[0][0, first:16], leaks[1][0, first:16]), "without the mask it would leak"


def test_only_what_is_learned_has_a_gradient():
    """Labels are shifted once: the loss is the cross-entropy of the learned ids, each after what stands before it."""
    example = Example((3, 7, 1, 4), (False, False, True, True))
    model = a_model().eval()
    inputs, labels = PaddedRows([example]).batch([0])
    assert inputs.tolist() == [[3, 7, 1]] and labels.tolist() == [[-100, 1, 4]]
    loss, _ = Answers().loss(model, (inputs, labels))
    logits = model(torch.tensor([[3, 7, 1]]))[0].log_softmax(-1)
    assert loss.item() == pytest.approx(-(logits[1, 1] + logits[2, 4]).item(), rel=1e-5)
    assert lm_loss(model(inputs), labels, "sum").item() == pytest.approx(loss.item())


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary_scores_what_it_scored(tied):
    model = a_model(tie_embeddings=tied)
    grown = grow_vocabulary(model, 40)
    ids = torch.randint(31, (2, 9))
    assert torch.equal(grown(ids)[..., :31], model(ids)) or torch.allclose(
        grown(ids)[..., :31], model(ids), atol=1e-6
    )
    assert grown.config.vocab_size == 40 and grown.training == model.training
    assert (grown.head.weight is grown.tokens.weight) == tied
    new = grown.tokens.weight[31:]
    assert len(torch.unique(new, dim=0)) == 9, "each new token is another one"
    assert (new - model.tokens.weight.mean(0)).norm(dim=1).max() < model.tokens.weight.std(0).norm()
    with pytest.raises(ValueError, match="a vocabulary only grows"):
        grow_vocabulary(grown, 31)

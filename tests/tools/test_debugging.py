"""The debugging tools of lesson 0.4: each planted bug is named, and no hook stays behind."""

from __future__ import annotations

import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tutorial_lib.core.gpt import GPT, GPTConfig
from tutorial_lib.tools.debugging import (
    ActivationStats,
    as_table,
    check_shape,
    gradient_stats,
    overfit_one_batch,
)
from tutorial_lib.tools.gradient_check import gradient_check
from tutorial_lib.tools.nan_hunter import NaNHunter, NonFiniteError


def gpt(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "max_seq_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 2}
    return GPT(GPTConfig(**{**sizes, **changes}))


def ids() -> Tensor:
    return torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Do(nn.Module):
    """A module from a function; its parts run first, one after the other."""

    def __init__(self, do, *parts: nn.Module) -> None:
        super().__init__()
        self.do, self.parts = do, nn.ModuleList(parts)

    def forward(self, x: Tensor, **kwargs):
        for part in self.parts:
            x = part(x)
        return self.do(x, **kwargs)


# --- check_shape --------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), min_size=0, max_size=5)


@given(shapes)
def test_check_shape_names_every_dimension(shape):
    names = "abcde"[: len(shape)]
    assert check_shape(torch.zeros(shape), " ".join(names)) == dict(zip(names, shape, strict=True))
    assert check_shape(torch.zeros(shape), " ".join(map(str, shape))) == {}
    assert check_shape(torch.zeros(shape), "...") == {}


@given(shapes.filter(len), st.data())
def test_check_shape_names_the_wrong_dimension(shape, data):
    at = data.draw(st.integers(0, len(shape) - 1))
    names = "abcde"[: len(shape)]
    with pytest.raises(ValueError, match=f'dimension {at}, "{names[at]}"'):
        check_shape(torch.zeros(shape), " ".join(names), **{names[at]: shape[at] + 1})
    with pytest.raises(ValueError, match=f"names {len(shape)} of {len(shape) + 1} dimensions"):
        check_shape(torch.zeros(*shape, 1), " ".join(names))


def test_check_shape_same_name_same_size_and_chaining():
    with pytest.raises(ValueError, match='dimension 1, "t" of "t t", is 3, but 2 in dimension 0'):
        check_shape(torch.zeros(2, 3), "t t")
    sizes = check_shape(torch.zeros(2, 3), "b t")
    assert check_shape(torch.zeros(2, 5), "b v", **sizes) == {"b": 2, "t": 3, "v": 5}
    assert check_shape(torch.zeros(2, 3, 5, 7), "b ... c", c=7) == {"b": 2, "c": 7}
    assert check_shape(torch.zeros(2, 3), "_ x", x=3) == {"x": 3}
    with pytest.raises(ValueError):
        check_shape(torch.zeros(2), "a ... b")
    with pytest.raises(TypeError, match="got a tuple"):
        check_shape((torch.zeros(2), None), "b")


# --- overfit_one_batch --------------------------------------------------------------------------------------


def test_overfit_leaves_the_model_alone_and_finds_what_cannot_learn():
    model, x = gpt(), ids()
    before = [p.clone() for p in model.parameters()]
    losses = overfit_one_batch(model, next_token, (x, x), steps=80, lr=1e-2)
    assert len(losses) == 80 and abs(losses[0] - math.log(17)) < 0.3 and losses[-1] < 0.2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    twice = overfit_one_batch(model, lambda z, y: next_token(z.softmax(-1), y), (x, x), steps=80, lr=1e-2)
    assert twice[-1] > 1.5
    with pytest.raises(ValueError, match="no parameter reaches the loss"):
        overfit_one_batch(model, lambda z, y: next_token(z.detach(), y), (x, x), steps=1)


# --- gradient_check -----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), max_size=3))
def test_right_gradients_pass_and_a_scaled_one_fails(seed, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    smooth = lambda x: (x.sin() * x).exp()  # noqa: E731
    report = gradient_check(smooth, x)
    assert report.ok and report.checked == x.numel(), report

    def two_percent_off(x):
        y = smooth(x)
        return y + 0.02 * (y - y.detach())  # the same value, 1.02 times the gradient

    report = gradient_check(two_percent_off, x + 2)
    assert report.wrong == ["input 0"]
    assert report.worst.autograd == pytest.approx(1.02 * report.worst.numeric, rel=1e-4)


def test_the_report_names_tensor_index_and_both_numbers():
    class OneWrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            frozen = self.shift * torch.tensor([1.0, 0.0, 1.0]) + self.shift.detach() * torch.tensor(
                [0.0, 1, 0]
            )
            return (x * self.scale + frozen).sum()

    report = gradient_check(OneWrong(), [torch.randn(2, 3, generator=torch.Generator().manual_seed(0))])
    assert report.wrong == ["shift"] and report.worst.index == (1,)
    assert report.worst.autograd == 0 and report.worst.numeric == pytest.approx(2)
    assert "shift[1]: autograd says 0, differences say 2" in str(report)
    assert not report.ok and "wrong in 1 of 3 tensors" in str(report)


def test_a_whole_gpt_and_what_is_detached():
    model, x = gpt(), ids()[:1, :4]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert gradient_check(model, [x], samples=3).ok
    assert all(torch.equal(before[n], p) and p.dtype == torch.float32 for n, p in model.state_dict().items())
    report = gradient_check(lambda x: (x * 2).detach(), torch.ones(2))
    assert not report.ok and not report.worst.connected and "detached?" in str(report)


def test_weights_see_what_a_plain_sum_cannot():
    class MeanSoftmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(y := x.softmax(-1))
            return y

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * (grad - grad.mean(-1, keepdim=True))

    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    assert gradient_check(lambda x: MeanSoftmax.apply(x).sum(), x).ok
    assert not gradient_check(MeanSoftmax.apply, x).ok


def test_samples_are_bounded_repeatable_and_hold_the_largest():
    x = torch.arange(1000.0)
    wrong_at_the_end = lambda x: torch.cat([x[:-1] ** 2, (x[-1:] ** 3).detach()]) + 0 * x  # noqa: E731
    state = torch.get_rng_state()
    assert gradient_check(lambda x: (x**2).sum(), x, samples=7).checked == 7
    assert gradient_check(lambda x: x**2, x).checked == 100
    assert torch.equal(state, torch.get_rng_state())
    assert str(gradient_check(wrong_at_the_end, x, samples=5)) == str(
        gradient_check(wrong_at_the_end, x, samples=5)
    )
    spike = lambda x: x.sum() + 50 * (x[123] - x[123].detach())  # noqa: E731
    assert gradient_check(spike, x, samples=1).worst.index == (123,)


def test_refusals_of_the_gradient_check():
    x = torch.ones(3)
    for fn, inputs, why in (
        (lambda x: x.float() * 2, x, "float32 rounds too much"),
        (lambda x: nn.functional.dropout(x, 0.5), torch.ones(99), "dropout"),
        (lambda x: (x - 1).log(), x, "not finite"),
        (lambda i: i * 1.0, torch.ones(3).long(), "nothing to check"),
        (lambda x: x.long(), x, "float64"),
    ):
        with pytest.raises(ValueError, match=why):
            gradient_check(fn, inputs)
    trap = lambda x: torch.where(x > 0, x.sqrt(), 0.0)  # noqa: E731
    report = gradient_check(lambda x: trap(x).sum(), torch.tensor([-1.0, 4.0]))
    assert report.worst.index == (0,) and math.isnan(report.worst.autograd)


# --- NaNHunter ----------------------------------------------------------------------------------------------


def hunt(model: nn.Module, *args, backward: bool = False, **kwargs):
    """The first finding of a hunter that stops, after a look that all is tidy."""
    before = hooks(model)
    try:
        with NaNHunter(model) as hunter:
            out = model(*args, **kwargs)
            if backward:
                next(t for t in (out if isinstance(out, tuple) else (out,))).sum().backward()
    except NonFiniteError as error:
        assert error.args[0] is hunter.first and str(error) == str(hunter.first) and "\n" not in str(error)
    assert hooks(model) == before
    return hunter.first


def layers(middle) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), middle), nn.Linear(3, 3))


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("do", "what"),
    [
        (lambda x: (x - 9).log(), "6 NaN"),
        (lambda x: x / 0, "6 infinite"),
        (lambda x: (x * 1e30) * 1e30, "6 infinite"),
        (lambda x: x.masked_fill(x == x, -math.inf).softmax(-1), "6 NaN"),
    ],
)
def test_forward_the_first_culprit_is_named(do, what):
    finding = hunt(layers(Do(do)), X)
    assert (finding.when, finding.module, finding.kind) == ("forward", "1.1", "Do")
    assert what in str(finding) and finding.given.numbers == 6 and not finding.given.nan


def test_code_between_parts_is_blamed_with_the_part_that_got_it():
    model = layers(Do(lambda x: x, Do(lambda x: x)))
    model[1][1].forward = lambda x: model[1][1].parts[0](x / 0 - x / 0) + 0
    finding = hunt(model, X)
    assert finding.module == "1.1" and "before it called 1.1.parts.0" in str(finding)
    root = Do(lambda x: x.log(), nn.Linear(3, 3))
    with torch.no_grad():
        root.parts[0].weight.zero_(), root.parts[0].bias.fill_(-1)
    assert hunt(root, X).module == "the model itself"


@settings(max_examples=30)
@given(st.integers(0, 9), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_in_a_deep_stack_the_right_layer_is_named(at, bad):
    stack = [nn.Linear(3, 3) for _ in range(10)]
    stack[at] = Do(lambda x: x + bad)
    finding = hunt(nn.Sequential(nn.Sequential(*stack)), X)
    assert finding.module == f"0.{at}" and finding.when == "forward"


def test_nobody_is_blamed_without_cause():
    assert hunt(gpt(), ids(), backward=True) is None
    assert hunt(layers(nn.Identity()), X * math.nan) is None  # it came from outside
    hides = Do(lambda x, mask=None: (x + mask).softmax(-1))
    mask = torch.tensor([0.0, -math.inf, 0.0])
    assert hunt(hides, X, mask=mask) is None  # −inf in a keyword, finite numbers out
    assert hunt(hides, X, mask=torch.full((3,), -math.inf)).made.nan == 6  # −inf in, NaN out


def test_infinity_can_be_let_by():
    model = nn.Sequential(Do(lambda x: x - math.inf), Do(lambda x: x.softmax(-1)))
    with pytest.raises(NonFiniteError, match="0 .Do.*6 infinite"), NaNHunter(model):
        model(X)
    with pytest.raises(NonFiniteError, match="1 .Do.*6 NaN"), NaNHunter(model, inf=False):
        model(X)


def test_tuples_dicts_and_named_tuples_pass_through():
    Pair = namedtuple("Pair", "x y")
    for wrap, take in (
        (lambda x: (x, None, [x * 2]), lambda t: t[0] + t[2][0]),
        (lambda x: {"a": x, "b": 3}, lambda t: t["a"] * t["b"]),
        (lambda x: Pair(x, 1), lambda t: t.x + t.y),
    ):
        model = nn.Sequential(nn.Linear(3, 3), Do(wrap), Do(take))
        plain = model(X)
        with NaNHunter(model):
            hunted = model(X)
            hunted.sum().backward()
        assert torch.equal(plain, hunted)
        broken = nn.Sequential(nn.Linear(3, 3), Do(lambda x, w=wrap: w(x / 0)), Do(take))
        assert hunt(broken, X).module == "1"


def test_a_module_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.root, self.last = Do(torch.sqrt), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.root(-self.root(x)))

    finding = hunt(Twice(), X)
    assert finding.module == "root" and finding.given.highest == -1


def test_in_place_layers_are_hunted_too():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.ReLU(inplace=True), Do(lambda x: x.mul_(math.inf)), nn.Linear(3, 3)
    )
    with torch.no_grad():
        model[0].bias.fill_(9.0)
    assert hunt(model, X).module == "2"
    good = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    with NaNHunter(good):
        good(X).sum().backward()


def zero_norm(x: Tensor) -> Tensor:
    length = x.square().sum(-1, keepdim=True).sqrt()
    return torch.where(length > 0, x / length, 0.0)


def test_backward_the_where_trap_is_named():
    model = nn.Sequential(nn.Linear(3, 3), Do(zero_norm), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    assert model(X).isfinite().all()
    finding = hunt(model, X, backward=True)
    assert (finding.when, finding.module) == ("backward", "1") and "a gradient of 6 finite" in str(finding)


def test_backward_in_the_code_between_parts_and_as_a_parameters_gradient():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(5, 3), nn.Linear(3, 3)
            nn.init.zeros_(self.a.weight)

        def forward(self, ids):
            return self.b(zero_norm(self.a(ids)))  # nothing that goes in requires grad

    finding = hunt(Between(), torch.tensor([1, 2]), backward=True)
    assert finding.module == "the model itself" and "on the way back to a" in str(finding)

    class Power(nn.Module):
        def __init__(self):
            super().__init__()
            self.exponent = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            return x.abs().clamp(max=0) ** self.exponent - (0 * self.exponent).sqrt()

    finding = hunt(nn.Sequential(Power()), X, backward=True)
    assert finding.module == "0" and "gradient of its exponent" in str(finding)


def test_a_bad_gradient_from_outside_is_the_losss():
    model = gpt()
    with pytest.raises(NonFiniteError, match="from outside"), NaNHunter(model) as hunter:
        (model(ids()) * 0).sqrt().sum().backward()
    assert hunter.first.module == "the loss"


def test_bad_weights_are_said_to_be_bad_before():
    model = layers(nn.Identity())
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    finding = hunt(model, X)
    assert finding.module == "0" and "its weight was bad before" in str(finding)


def test_recording_keeps_the_first_of_each_pass_and_goes_on():
    model = layers(Do(lambda x: x / 0 * 0))
    with NaNHunter(model, stop=False) as hunter:
        for _ in range(2):
            model(X).sum().backward()
    assert [(f.when, f.module) for f in hunter.found] == [
        ("forward", "1.1"),
        ("backward", "2"),
    ] * 2  # 2 was given NaN


def test_hunting_changes_no_number_and_the_hunter_can_be_used_again():
    plain, hunted, x = gpt(), gpt(), ids()
    next_token(plain(x), x).backward()
    hunter = NaNHunter(hunted)
    for _ in range(2):
        hunted.zero_grad()
        with hunter:
            next_token(hunted(x), x).backward()
            with pytest.raises(RuntimeError, match="already at work"):
                hunter.__enter__()
        assert all(
            torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), hunted.parameters(), strict=True)
        )
    assert hooks(hunted) == 0
    model = layers(Do(zero_norm))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    with NaNHunter(model):
        out = model(X).sum()
    out.backward()  # the graph outlives the block, the hunter does not


def test_hooks_are_gone_after_any_error():
    model = gpt()
    for tool in (NaNHunter(model), ActivationStats(model)):
        with pytest.raises(KeyError), tool:
            assert hooks(model) > 0
            raise KeyError
        assert hooks(model) == 0


# --- statistics ---------------------------------------------------------------------------------------------


def test_activation_stats_are_those_of_the_output():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].bias[2] = -100.0  # a dead unit
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with ActivationStats(model) as stats:
        loss = model(x).square().sum()
        model(x)
        loss.backward()
    assert [(row.module, row.call) for row in stats.rows] == [(n, c) for c in (1, 2) for n in "012"]
    y = model[1](model[0](x)).detach()
    row = stats.rows[1]
    assert row.mean == pytest.approx(y.mean().item()) and row.max_abs == pytest.approx(y.max().item())
    assert row.std == pytest.approx(y.std(correction=0).item(), rel=1e-4)
    assert row.zeros == pytest.approx((y == 0).float().mean().item())
    assert row.dead >= 0.2 and row.dead == pytest.approx((y == 0).all(0).float().mean().item())
    out = model(x)
    expected = torch.autograd.grad(out.square().sum(), out)[0].std(correction=0).item()
    assert stats.rows[2].grad_std == pytest.approx(expected, rel=1e-4)
    assert stats.rows[5].grad_std is None
    assert len(as_table(stats.rows).splitlines()) == 7 and as_table([]) == "(no rows)"


def test_activation_stats_of_chosen_modules_only():
    with ActivationStats(gpt(), lambda name, module: name.endswith("attn")) as stats:
        stats.model(ids())
    assert [row.module for row in stats.rows] == ["blocks.0.attn", "blocks.1.attn"]


def test_gradient_stats_tell_none_from_zero():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    with torch.no_grad():
        model["used"].weight.copy_(torch.tensor([[3.0, 4.0]]))
        model["used"].bias.zero_()
    model["used"](torch.tensor([[0.6, 0.8]])).sum().backward()
    weight, bias, *rest = gradient_stats(model, lr=0.1)
    assert weight.weight_norm == pytest.approx(5) and weight.grad_norm == pytest.approx(1)
    assert weight.update_ratio == pytest.approx(0.02) and bias.update_ratio == math.inf
    assert all(row.grad_norm is None and row.update_ratio is None for row in rest)
    assert "–" in as_table(rest)

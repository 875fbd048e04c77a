"""Exercises of lesson 0.1, what a model costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tutorial_lib.checks.probes import equals, outcome, same_shape
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe
from tutorial_lib.tools.accounting import ModelShape, count_parameters

# --- 0.1.a --------------------------------------------------------------------------------------------------


def count_llama(
    vocab_size: int, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_mlp: int, tied: bool
) -> int:
    """The reference: the lesson's own count."""
    how: dict[str, Any] = {"gated": True, "tied": tied, "bias": False, "norm": "rmsnorm"}
    shape = ModelShape(vocab_size, d_model, n_layers, n_heads, n_kv_heads, d_mlp=d_mlp, **how)
    return count_parameters(shape)["total"]


def _count_variant(
    d_kv: Callable[[int, int, int], int] = lambda D, H, G: D // H * G,
    square: int = 2,
    matrices: int = 3,
    norms: int = 2,
    last_norm: int = 1,
    tables: tuple[int, int] = (1, 2),
) -> Callable[..., int]:
    """The count with one of its numbers wrong; `tables` is how many there are tied, and not."""

    def wrong(V: int, D: int, L: int, H: int, G: int, M: int, tied: bool) -> int:
        layer = square * D * D + 2 * D * d_kv(D, H, G) + matrices * D * M + norms * D
        return V * D * tables[not tied] + L * layer + last_norm * D

    return wrong


COUNT = Exercise(
    id="0.1.a",
    symbol="count_llama",
    reference=count_llama,
    look_again="Parameters: what is learned",
    probes=[
        Probe("a whole number comes back", lambda f: f(10, 6, 1, 6, 2, 5, True), same_shape),
        Probe(
            "two layers, by hand",  # with one, a norm missing in each layer looks like the last one missing
            lambda f: f(10, 6, 2, 6, 2, 5, True),
            equals(),
            given="V 10, D 6, 2 layers, 6 heads, 2 of them with keys, M 5, tied",
        ),
        Probe(
            "three layers",
            lambda f: f(10, 6, 3, 6, 2, 5, True),
            equals(),
            given="the same with 3 layers",
        ),
        Probe("a head of its own", lambda f: f(10, 6, 1, 6, 2, 5, False), equals(), given="the same, untied"),
        Probe(
            "as many key heads as heads: Llama 2 7B",
            lambda f: f(32000, 4096, 32, 32, 32, 11008, False),
            equals(),
            given="V 32000, D 4096, 32 layers, 32 heads, all with keys, M 11008, untied",
        ),
        Probe(
            "fewer: Llama 3 8B",
            lambda f: f(128256, 4096, 32, 32, 8, 14336, False),
            equals(),
            given="V 128256, D 4096, 32 layers, 32 heads, 8 of them with keys, M 14336, untied",
        ),
        Probe(
            "tied: SmolLM2-135M",
            lambda f: f(49152, 576, 30, 9, 3, 1536, True),
            equals(),
            given="V 49152, D 576, 30 layers, 9 heads, 3 of them with keys, M 1536, tied",
        ),
    ],
    misconceptions=[
        Misconception(
            "two matrices in the MLP",
            _count_variant(matrices=2),
            "You counted an MLP that goes up and down. A gated one has a third matrix, the gate, of the same size.",
        ),
        Misconception(
            "keys for every head",
            _count_variant(d_kv=lambda D, H, G: D),
            "Keys and values were counted for every head, D × D each. Only n_kv_heads heads have them: the width is "
            "n_kv_heads times the width of one head.",
        ),
        Misconception(
            "the width divided by the key heads",
            _count_variant(d_kv=lambda D, H, G: D // G),
            "You took d_model / n_kv_heads for the width of keys and values. A head is d_model / n_heads wide, and "
            "there are n_kv_heads of them.",
        ),
        Misconception(
            "the way back forgotten",
            _count_variant(square=1),
            "One D × D matrix is missing: queries have one, and the heads' results go through another on the way back.",
        ),
        Misconception(
            "no norms",
            _count_variant(norms=0, last_norm=0),
            "The norms are missing. They are small, two times D in a layer and D at the end, but a count that is not "
            "exact cannot be checked.",
        ),
        Misconception(
            "the last norm forgotten",
            _count_variant(last_norm=0),
            "You are D numbers short: after the last layer there is one more norm, before the head.",
        ),
        Misconception(
            "the tied head counted",
            _count_variant(tables=(2, 2)),
            "The table was counted twice although the head is tied: it is one tensor with two names, and learned once.",
        ),
        Misconception(
            "the head forgotten",
            _count_variant(tables=(1, 1)),
            "An untied head is a second table of V × D, with weights of its own.",
        ),
    ],
)

# --- 0.1.b --------------------------------------------------------------------------------------------------

PARTS = ("weights", "gradients", "master", "moments", "activations", "total")


def _memory_variant(
    gradients: int = 2,
    master: int = 4,
    moments: int = 8,
    number: int = 2,
    whole_batch: bool = True,
    left_out: tuple[str, ...] = (),
) -> Callable[..., dict[str, int]]:
    """The sum with some of its bytes wrong; without arguments, it is right."""

    def estimate(n_params: int, activations_per_token: int, batch_size: int, seq_len: int) -> dict[str, int]:
        tokens = seq_len * (batch_size if whole_batch else 1)
        memory = {
            "weights": 2 * n_params,
            "gradients": gradients * n_params,
            "master": master * n_params,
            "moments": moments * n_params,
            "activations": number * activations_per_token * tokens,
        }
        return memory | {"total": sum(size for name, size in memory.items() if name not in left_out)}

    return estimate


def _has_all(yours: Any, expected: Any) -> Failure | None:
    if not isinstance(yours, dict):
        return Failure(f"it returned a {type(yours).__name__}, expected a dict")
    if yours.keys() != expected.keys():
        table = {"yours": ", ".join(map(str, yours)), "expected": ", ".join(expected)}
        return Failure("the names differ", table)
    return None


def _some(*names: str, **sizes: int) -> Callable[[Any], Any]:
    """Only these of the terms, so that each probe judges one thing."""

    def run(estimate: Any) -> Any:
        memory = estimate(**sizes)
        return {name: memory[name] for name in names}

    return run


SMALL = {"n_params": 10, "activations_per_token": 7, "batch_size": 3, "seq_len": 5}
SMALL_TEXT = "10 parameters; 3 sequences of 5 tokens, each token leaves 7 numbers"
# About Llama 2 7B's numbers: 32 layers, D = 4096.
SEVEN_B = {"n_params": 6_738_415_616, "activations_per_token": 2_662_400, "batch_size": 4, "seq_len": 4096}

MEMORY = Exercise(
    id="0.1.b",
    symbol="mixed_precision_memory",
    reference=_memory_variant(),
    look_again="Memory: what must lie ready",
    probes=[
        Probe("six terms come back", lambda f: f(**SMALL), _has_all),
        Probe("weights and gradients", _some("weights", "gradients", **SMALL), equals(), given=SMALL_TEXT),
        Probe("what the optimizer keeps", _some("master", "moments", **SMALL), equals(), given=SMALL_TEXT),
        Probe("activations", _some("activations", **SMALL), equals(), given=SMALL_TEXT),
        Probe("the total, by hand", lambda f: f(**SMALL), equals(), given=SMALL_TEXT),
        Probe(
            "16 bytes for each parameter",
            lambda f: f(n_params=1, activations_per_token=9, batch_size=0, seq_len=8)["total"],
            equals(),
            given="one parameter, an empty batch",
        ),
        Probe("seven billion parameters", lambda f: f(**SEVEN_B), equals()),
    ],
    misconceptions=[
        Misconception(
            "the optimizer as given",
            _memory_variant(master=0, moments=4, whole_batch=False),
            "The optimizer's two terms are still as they were given. Its master copy and both of its moments are fp32, "
            "4 bytes for each number.",
        ),
        Misconception(
            "no master copy",
            _memory_variant(master=0),
            "The moments are right; the master copy is still missing. Weights in bf16 have some three digits, so an "
            "update of a thousandth would vanish: the optimizer adds it to an fp32 copy.",
        ),
        Misconception(
            "moments in bf16",
            _memory_variant(moments=4),
            "Two moments of 2 bytes each: but AdamW keeps them in fp32, whatever the weights are.",
        ),
        Misconception(
            "copy and moments swapped",
            _memory_variant(moments=4, master=8),
            "Master copy and moments have changed places: the copy is one fp32 number for each parameter, the moments "
            "are two.",
        ),
        Misconception(
            "gradients in fp32",
            _memory_variant(gradients=4),
            "You counted 4 bytes for a gradient. Some recipes do keep them so; in this one they are bf16, like the "
            "weights that they belong to.",
        ),
        Misconception(
            "one sequence only",
            _memory_variant(whole_batch=False),
            "These are the activations of one sequence. All of the batch goes forward before anything goes back, so "
            "all of it must be kept.",
        ),
        Misconception(
            "numbers, not bytes",
            _memory_variant(number=1),
            "You counted how many numbers the activations are; each of them takes 2 bytes in bf16.",
        ),
        Misconception(
            "a total without the optimizer",
            _memory_variant(left_out=("master", "moments")),
            "Each term is right, and the total leaves out master copy and moments: three quarters of what belongs to "
            "the parameters.",
        ),
    ],
)

# --- 0.1.c --------------------------------------------------------------------------------------------------


def plan_run(
    chips: int, hours: float, flops_per_second: float, utilization: float, tokens_per_param: float = 20.0
) -> tuple[float, float]:
    """The reference: the positive root of 6·N·(r·N) = budget."""
    if utilization <= 0 or utilization > 1:
        raise ValueError("utilization is a fraction")
    n_params = (chips * hours * 3600.0 * flops_per_second * utilization / 6 / tokens_per_param) ** 0.5
    return n_params, tokens_per_param * n_params


def _plan_variant(
    seconds: float = 3600.0,
    use: bool = True,
    all_chips: bool = True,
    factor: float = 6.0,
    fractions_only: bool = True,
    finish: Callable[[float, float], tuple[float, float]] | None = None,
) -> Callable[..., tuple[float, float]]:
    """A plan with a slip in the budget, in the factor of 6, or in how it is split (`finish`)."""

    def wrong(
        chips: int, hours: float, flops_per_second: float, utilization: float, tokens_per_param: float = 20.0
    ) -> tuple[float, float]:
        if fractions_only and not 0 < utilization <= 1:
            raise ValueError("utilization is a fraction")
        budget = hours * seconds * flops_per_second * (utilization if use else 1.0)
        budget *= chips if all_chips else 1
        if finish is not None:
            return finish(budget, tokens_per_param)
        n_params = math.sqrt(budget / (factor * tokens_per_param))
        return n_params, tokens_per_param * n_params

    return wrong


def _the_rest_for_tokens(budget: float, r: float) -> tuple[float, float]:
    n_params = math.sqrt(budget / (6 * r))
    return n_params, budget / n_params


def _no_root(budget: float, r: float) -> tuple[float, float]:
    return budget / (6 * r), budget / 6


def _upside_down(budget: float, r: float) -> tuple[float, float]:
    tokens = math.sqrt(budget / (6 * r))
    return r * tokens, tokens


def _half_and_half(budget: float, r: float) -> tuple[float, float]:
    return math.sqrt(budget / 6), math.sqrt(budget / 6)


def _two_floats(yours: Any, expected: Any) -> Failure | None:
    if (
        isinstance(yours, (tuple, list))
        and len(yours) == 2
        and all(isinstance(x, (int, float)) for x in yours)
    ):
        return None
    return Failure(f"it returned a {type(yours).__name__}, expected two numbers: parameters and tokens")


HAND = {"chips": 2, "hours": 1.0, "flops_per_second": 1000.0, "utilization": 0.5, "tokens_per_param": 15.0}


def _share_of_budget(plan: Any) -> float:
    n_params, n_tokens = plan(**HAND)
    return 6 * n_params * n_tokens / 3_600_000


def _spends_it(yours: Any, expected: Any) -> Failure | None:
    if abs(yours - 1) < 1e-6:
        return None
    table = {"6·N·D / budget": f"{yours:.4g}", "expected": "1"}
    return Failure("your N and D do not cost what the cluster can compute in that time", table)


def _text(**how: float) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in how.items())


CHINCHILLA = {"chips": 1000, "hours": 1000.0, "flops_per_second": 4e14, "utilization": 0.4}

PLAN = Exercise(
    id="0.1.c",
    symbol="plan_run",
    reference=plan_run,
    look_again="Tokens, time, energy, money",
    probes=[
        Probe("two numbers come back", lambda f: f(**HAND), _two_floats),
        Probe("the whole budget is spent", _share_of_budget, _spends_it, given=_text(**HAND)),
        Probe("a small budget, by hand", lambda f: f(**HAND), equals(), given=_text(**HAND)),
        Probe(
            "about Chinchilla's budget, 20 tokens for each parameter",
            lambda f: f(**CHINCHILLA),
            equals(),
            given=_text(**CHINCHILLA),
        ),
        Probe(
            "four times the chips: twice the model",
            lambda f: [a / b for a, b in zip(f(256, 24, 1e15, 0.3), f(64, 24, 1e15, 0.3), strict=True)],
            equals(),
        ),
        Probe(
            "a budget so small that fractions show",
            lambda f: f(1, 1.0, 10.0, 1.0),
            equals(),
            given="chips 1, hours 1, flops_per_second 10, utilization 1: N and D are floats, not rounded",
        ),
        Probe("a utilization of 1 is allowed", lambda f: f(3, 2.5, 1e12, 1), equals()),
        Probe(
            "percent, zero and less: a ValueError",
            lambda f: [
                outcome(lambda u=u: f(1, 1.0, 1e12, u) and "no error") for u in (40, 1.01, 0, 0.0, -0.4)
            ],
            equals(),
            given="utilization 40, 1.01, 0, 0.0 and -0.4",
        ),
    ],
    misconceptions=[
        Misconception(
            "hours taken for seconds",
            _plan_variant(seconds=1.0),
            "The chips compute per second and you have them for hours: multiply by 3600.",
        ),
        Misconception(
            "the data sheet believed",
            _plan_variant(use=False),
            "This plan spends the peak of the data sheet; training reaches the fraction `utilization` of it.",
        ),
        Misconception(
            "one chip",
            _plan_variant(all_chips=False),
            "This is the budget of a single chip: all of them compute side by side.",
        ),
        Misconception(
            "forward only",
            _plan_variant(factor=2.0),
            "2·N·D is the way forward. The way back costs twice as much again: 6·N·D.",
        ),
        Misconception(
            "tokens without the 6",
            _plan_variant(finish=_the_rest_for_tokens),
            "N is right, and D is budget / N: that spends six times what you have. D is r · N, or budget / (6 · N), "
            "which is the same.",
        ),
        Misconception(
            "no root",
            _plan_variant(finish=_no_root),
            "You divided the budget by 6·r and called it N, but it is N²: N appears twice in 6 · N · (r · N).",
        ),
        Misconception(
            "the ratio upside down",
            _plan_variant(finish=_upside_down),
            "You have more parameters than tokens (or they changed places on the way out). r is how many tokens each parameter sees: D = r · N.",
        ),
        Misconception(
            "percent go through",
            _plan_variant(fractions_only=False),
            "The plan is right, but a utilization of 40 gives a cluster forty times as fast as its data sheet: raise a "
            "ValueError unless it is above 0 and at most 1.",
        ),
    ],
)

EXERCISES = [COUNT, MEMORY, PLAN]

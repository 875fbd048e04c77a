"""Exercises of lesson 4.3, learning-rate schedules and optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.checks.probes import equals, fill_by_name
from tutorial_lib.checks.spec import Exercise, Failure, Misconception, Probe
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.train.losses import lm_loss
from tutorial_lib.train.muon import muon_groups

# ── 4.3.a ────────────────────────────────────────────────────────────────────────────────────────────────


def param_groups(model: nn.Module, lr: float, matrix_lr: float, weight_decay: float) -> list[dict]:
    """The reference: the package's."""
    return muon_groups(model, matrix_lr, lr, weight_decay)


def _variant(
    inside: Callable[[str, Tensor], bool] = lambda name, p: p.ndim >= 2 and name.startswith("blocks."),
    decays: Callable[[str, Tensor], bool] = lambda name, p: p.ndim >= 2,
    once: bool = True,
    frozen: bool = False,
    swapped: bool = False,
    vectors_decay: bool = False,
) -> Callable[..., list[dict]]:
    def wrong(model: nn.Module, lr: float, matrix_lr: float, weight_decay: float) -> list[dict]:
        lists: tuple[list, list, list] = ([], [], [])
        for name, p in model.named_parameters(remove_duplicate=once):
            if p.requires_grad or frozen:
                lists[0 if inside(name, p) else 1 if decays(name, p) else 2].append(p)
        rates = (lr, matrix_lr, matrix_lr) if swapped else (matrix_lr, lr, lr)
        decay = (weight_decay, weight_decay, weight_decay if vectors_decay else 0.0)
        return [
            {"params": lists[i], "lr": rates[i], "weight_decay": decay[i], "muon": i == 0} for i in range(3)
        ]

    return wrong


def in_two_groups(model: nn.Module, lr: float, matrix_lr: float, weight_decay: float) -> list[dict]:
    """The blocks' matrices are in group 0 and again in group 1: an optimizer would refuse them or step them
    twice. Group 1 is what has two dimensions and is not in group 0."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in trainable if name.startswith("blocks.") and p.ndim >= 2]
    return [
        {"params": inside, "lr": matrix_lr, "weight_decay": weight_decay, "muon": True},
        {"params": [p for _, p in trainable if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay}
        | {"muon": False},
        {"params": [p for _, p in trainable if p.ndim < 2], "lr": lr, "weight_decay": 0.0, "muon": False},
    ]


class _Toy(nn.Module):
    """A table, one block with a matrix, a bias and a norm, and an output layer that may be the table."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 6), "norm": nn.LayerNorm(4)})])
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def _model(**changes: Any) -> Transformer:
    shape = {"vocab_size": 11, "max_seq_len": 8, "d_model": 8, "n_heads": 2, "n_layers": 2}
    return fill_by_name(Transformer(ModelConfig(**shape | changes)), 0.1)


def _frozen_toy() -> nn.Module:
    """One of each group is frozen."""
    model = _Toy()
    for p in (model.tokens.weight, model.blocks[0]["up"].weight, model.blocks[0]["norm"].bias):
        p.requires_grad_(False)
    return model


def _trainable_after(learner: Any) -> dict[str, bool]:
    model = _frozen_toy()
    learner(model, 0.003, 0.02, 0.1)
    return {name: p.requires_grad for name, p in model.named_parameters()}


def _same_flags(yours: Any, expected: Any) -> Failure | None:
    changed = [name for name in expected if yours.get(name) is not expected[name]]
    sentence = (
        f"your function changed the model: requires_grad of {', '.join(changed)}. Read it, and leave it"
    )
    return Failure(sentence) if changed else None


def _experts() -> nn.Module:
    """A block with a stack of matrices, as a later part has for its experts."""
    model = _Toy()
    model.blocks[0].register_parameter("experts", nn.Parameter(torch.ones(2, 4, 4)))
    return model


def _alike() -> nn.Module:
    """Names that only look like a block's, a norm's or a bias's, and a block's vector that looks like nothing."""
    model = _Toy()
    model.blocks_mixer = nn.Linear(4, 4, bias=False)
    model.old = nn.ModuleDict({"blocks": nn.Linear(4, 4, bias=False)})
    model.bias_table = nn.Parameter(torch.ones(3, 4))
    model.blocks[0].norm_mixer = nn.Linear(4, 4, bias=False)
    model.blocks[0].register_parameter("gain", nn.Parameter(torch.ones(4)))
    return model


def _names(groups: list[dict], model: nn.Module) -> list[str]:
    """What is in each group, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [", ".join(names.get(id(p), "?") for p in group["params"]) or "nothing" for group in groups]


def _sort(learner: Any, make: Callable[[], nn.Module]) -> Any:
    model = make()
    return tuple(_names(learner(model, 0.003, 0.02, 0.1), model))


def _numbers(learner: Any) -> Any:
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in learner(_Toy(), 0.003, 0.02, 0.1)
    ]


def _listed(yours: Any, expected: Any) -> Failure | None:
    if not isinstance(yours, (list, tuple)) or len(yours) != 3:
        return Failure("it did not return a list of three groups")
    for i, (mine, theirs) in enumerate(zip(yours, expected, strict=True)):
        if mine != theirs:
            return Failure(f"group {i} holds other parameters", {"yours": mine, "expected": theirs})
    return None


def _settings(yours: Any, expected: Any) -> Failure | None:
    for i, (mine, theirs) in enumerate(zip(yours, expected, strict=True)):
        for key, value in theirs.items():
            if key not in mine:
                return Failure(f"group {i} has no {key!r}")
            if mine[key] != value:
                return Failure(
                    f"{key!r} of group {i} differs", {"yours": str(mine[key]), "expected": str(value)}
                )
        if extra := mine.keys() - theirs.keys():
            return Failure(f"group {i} has a key that nobody asked for: {min(extra)!r}")
    return None


A = Exercise(
    id="4.3.a",
    symbol="param_groups",
    reference=param_groups,
    look_again="Three groups",
    probes=[
        Probe(
            "a small model, by hand",
            lambda f: _sort(f, _Toy),
            _listed,
            given="tokens (5, 4), blocks.0.up (6, 4) with bias, blocks.0.norm with bias, head (5, 4)",
        ),
        Probe(
            "each group's rate, decay and mark",
            _numbers,
            _settings,
            given="lr 0.003, matrix_lr 0.02, decay 0.1",
        ),
        Probe(
            "a tied output layer is there once",
            lambda f: _sort(f, lambda: _Toy(tied=True)),
            _listed,
            given="the same model, head.weight is tokens.weight",
        ),
        Probe(
            "frozen parameters are left out",
            lambda f: _sort(f, _frozen_toy),
            _listed,
            given="the same model; tokens.weight, blocks.0.up.weight and blocks.0.norm.bias are frozen",
        ),
        Probe("the model stays as it is", _trainable_after, _same_flags, given="the same, partly frozen"),
        Probe("the course's Transformer", lambda f: _sort(f, lambda: _model(qk_norm=True)), _listed),
        Probe(
            "a GPT-2, whose positions are a table",
            lambda f: _sort(f, lambda: _model(rope=False, norm="layernorm", mlp="gelu", bias=True)),
            _listed,
        ),
        Probe(
            "a stack of matrices goes with the matrices",
            lambda f: _sort(f, _experts),
            _listed,
            given="the first model, with blocks.0.experts (2, 4, 4)",
        ),
        Probe(
            "names that only look alike",
            lambda f: _sort(f, _alike),
            _listed,
            given="the first model, with blocks_mixer, old.blocks, bias_table, blocks.0.norm_mixer (2-D) and "
            "blocks.0.gain (1-D)",
        ),
    ],
    misconceptions=[
        Misconception(
            "every matrix to Muon",
            _variant(inside=lambda name, p: p.ndim >= 2),
            "The embedding and the output layer went to the matrices' group. A table's rows are looked up one by one, "
            "there is no map whose directions could be evened out; only matrices whose name begins with blocks. go there.",
        ),
        Misconception(
            "everything in the blocks to Muon",
            _variant(inside=lambda name, p: name.startswith("blocks.")),
            "The blocks' norms and biases went along with their matrices: they have one dimension, and nothing in them can be "
            "made orthogonal. Ask for two dimensions or more, too.",
        ),
        Misconception(
            "stacks left behind",
            _variant(inside=lambda name, p: p.ndim == 2 and name.startswith("blocks.")),
            "A stack of matrices, (E, m, n), went to the tables' group. Each of its E matrices is a map like the others of "
            "the blocks: ask for two dimensions or more.",
        ),
        Misconception(
            "biases by their name",
            _variant(decays=lambda name, p: not name.endswith("bias")),
            "Only what is called bias was spared the decay, and norm weights were pulled to zero with the rest; ask for the "
            "number of dimensions.",
        ),
        in_two_groups,
        Misconception(
            "the rates exchanged",
            _variant(swapped=True),
            "matrix_lr is the rate of group 0, lr that of the other two; yours are exchanged.",
        ),
        Misconception(
            "vectors decay",
            _variant(vectors_decay=True),
            "Group 2 got the weight decay. It pulls the scales of the norms towards zero, which mutes their layers; its decay "
            "is 0.",
        ),
        Misconception(
            "tied twice",
            _variant(once=False),
            "The tied table was counted under both of its names, so it would be updated twice in a step; named_parameters() "
            "gives each tensor once unless it is told otherwise.",
        ),
        Misconception(
            "frozen, too",
            _variant(frozen=True),
            "Frozen parameters are in a group. They get no gradient, but an optimizer that is handed zeros would decay them; "
            "leave out what has requires_grad False.",
        ),
    ],
)

# ── 4.3.b ────────────────────────────────────────────────────────────────────────────────────────────────

Batches = list[tuple[Tensor, Tensor]]


def train_accumulated(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Batches,
    accumulate: int,
    schedule: Callable[[float], float],
) -> list[list[float]]:
    """The reference: in slices, one for each step."""
    groups = optimizer.param_groups
    peaks = [group["lr"] for group in groups]
    n = len(micro_batches) // accumulate
    used = []
    for step in range(n):
        optimizer.zero_grad()
        for inputs, labels in micro_batches[step * accumulate : (step + 1) * accumulate]:
            (lm_loss(model(inputs), labels) / accumulate).backward()
        used.append([peak * schedule((step + 0.5) / n) for peak in peaks])
        for group, rate in zip(groups, used[-1], strict=True):
            group["lr"] = rate
        optimizer.step()
    return used


def _loop(
    counted: str = "steps",
    total: str = "steps",
    middle: float = 0.5,
    peak: str = "own",
    late: bool = False,
    mean: bool = True,
) -> Callable[..., list[list[float]]]:
    def wrong(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: Batches,
        accumulate: int,
        schedule: Callable[[float], float],
    ) -> list[list[float]]:
        groups = optimizer.param_groups
        peaks = [groups[0 if peak == "first" else i]["lr"] for i in range(len(groups))]
        n = len(micro_batches) // accumulate
        used = []

        def set_rates(i: int) -> None:
            done = i if counted == "micro" else i // accumulate
            for group, own in zip(groups, peaks, strict=True):
                top = group["lr"] if peak == "current" else own
                group["lr"] = top * schedule(
                    (done + middle) / (len(micro_batches) if total == "micro" else n)
                )

        optimizer.zero_grad()
        for i, (inputs, labels) in enumerate(micro_batches):
            (lm_loss(model(inputs), labels) / (accumulate if mean else 1)).backward()
            if (i + 1) % accumulate == 0:
                if not late:
                    set_rates(i)
                used.append([group["lr"] for group in groups])
                optimizer.step()
                optimizer.zero_grad()
            if late and (counted == "micro" or (i + 1) % accumulate == 0):
                set_rates(i)
        return used

    return wrong


class _Descent(torch.optim.Optimizer):
    """Gradient descent with groups. torch's own __init__ and step would first import its compiler: seconds."""

    def __init__(self, rates: dict[nn.Module, float]) -> None:
        self.param_groups = [{"params": list(m.parameters()), "lr": lr} for m, lr in rates.items()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


def _language(alone: bool = False) -> tuple[nn.Module, Any]:
    """A model of a table and a matrix, and an optimizer with a rate for each, or with one for both."""
    model = fill_by_name(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), 0.5)
    return model, _Descent({model: 0.1} if alone else {model[0]: 0.1, model[1]: 0.4})


def _micro_batches(n: int) -> Batches:
    generator = torch.Generator().manual_seed(n)
    pairs = [torch.randint(7, (2, 6), generator=generator) for _ in range(n)]
    return [(ids[:, :-1], ids[:, 1:]) for ids in pairs]


def _rates(f: Any, n: int, accumulate: int, schedule: Callable[[float], float], alone: bool = False) -> Any:
    model, optimizer = _language(alone)
    used = f(model, optimizer, _micro_batches(n), accumulate, schedule)
    return torch.tensor([[float(rate) for rate in row] for row in used], dtype=torch.float64)


def _weights(f: Any, n: int, accumulate: int, schedule: Callable[[float], float]) -> Tensor:
    model, optimizer = _language()
    for p in model.parameters():  # somebody else's leftovers, which are not to count
        p.grad = torch.full_like(p, 3.0)
    f(model, optimizer, _micro_batches(n), accumulate, schedule)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def _longest(f: Any) -> Any:
    """The schedule is asked for nothing outside the run."""
    asked: list[float] = []
    _rates(f, 6, 3, lambda progress: (asked.append(progress), 0.5)[1])
    return min(asked) > 0 and max(asked) < 1


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


B = Exercise(
    id="4.3.b",
    symbol="train_accumulated",
    reference=train_accumulated,
    look_again="What goes wrong",
    probes=[
        Probe(
            "one group, one micro-batch a step",
            lambda f: _rates(f, 4, 1, lambda progress: progress, alone=True),
            equals(digits=4),
            given="peak 0.1, four micro-batches, accumulate 1, schedule(p) = p",
        ),
        Probe(
            "each group keeps its own peak",
            lambda f: _rates(f, 4, 1, lambda progress: progress),
            equals(digits=4),
            given="peaks 0.1 and 0.4, four micro-batches, accumulate 1, schedule(p) = p",
        ),
        Probe(
            "two micro-batches a step",
            lambda f: _rates(f, 4, 2, lambda progress: progress),
            equals(digits=4),
            given="peaks 0.1 and 0.4, four micro-batches, accumulate 2, schedule(p) = p",
        ),
        Probe(
            "the weights after six steps of three",
            lambda f: _weights(f, 18, 3, _half_cosine),
            equals(digits=4),
            given="18 micro-batches, accumulate 3; every .grad holds 3 at the start",
        ),
        Probe("the rates of six steps of three", lambda f: _rates(f, 18, 3, _half_cosine), equals(digits=4)),
        Probe(
            "the schedule is asked for moments inside the run only",
            _longest,
            equals(),
            given="six micro-batches, accumulate 3",
        ),
    ],
    misconceptions=[
        Misconception(
            "the code as given",
            _loop(counted="micro", peak="first", late=True),
            "This is the code as it was given. Start with the order: when the first step is taken, has anybody set its rate?",
        ),
        Misconception(
            "the rate after the step",
            _loop(late=True),
            "The rates are set after the step that they are for: the first step runs at the full peak, and every other one at "
            "its predecessor's rate. Set them just before optimizer.step().",
        ),
        Misconception(
            "one rate for all",
            _loop(peak="first"),
            "All groups got the first group's rate. Each has a peak of its own; multiply that by the factor.",
        ),
        Misconception(
            "counted in micro-batches",
            _loop(counted="micro"),
            "Progress counts micro-batches against a total in optimizer steps, so the schedule runs `accumulate` times too fast "
            "and has ended when the run has not.",
        ),
        Misconception(
            "the total in micro-batches",
            _loop(total="micro"),
            "Progress counts optimizer steps against a total in micro-batches, so the run ends before the schedule has come "
            "down; divide by the number of optimizer steps.",
        ),
        Misconception(
            "the beginning of the step",
            _loop(middle=0.0),
            "Progress is that of the step's beginning, so a warm-up gives the first step the rate 0; add half a step.",
        ),
        Misconception(
            "the factor on the last rate",
            _loop(peak="current"),
            "The factor was applied to the rate of the step before, so factors pile up; read the peaks once, before the loop.",
        ),
        Misconception(
            "losses added up",
            _loop(mean=False),
            "The rates are right, but the micro-batches' losses are added and not averaged: the gradient is `accumulate` times "
            "too large.",
        ),
    ],
)

# ── 4.3.c ────────────────────────────────────────────────────────────────────────────────────────────────


def inverse_sqrt_cooldown(
    progress: float, warmup: float = 0.05, floor: float = 0.0, decay: float = 0.2
) -> float:
    """The reference: the last line is a mixture of its two ends."""
    border = 1 - decay
    if progress < warmup:
        return progress / warmup
    if decay == 0 or progress <= border:
        return math.sqrt(warmup / progress)
    way = min(1.0, (progress - border) / decay)
    return (1 - way) * math.sqrt(warmup / border) + way * floor


def _root(
    power: float = 0.5,
    since: str = "start",
    top: str = "border",
    cut: bool = False,
    end: bool = True,
    cooldown: bool = True,
    from_: bool = False,
) -> Callable[..., float]:
    def wrong(progress: float, warmup: float = 0.05, floor: float = 0.0, decay: float = 0.2) -> float:
        if progress < warmup:
            return progress / warmup

        def root(p: float) -> float:
            return (warmup / p if since == "start" else warmup / max(p - warmup, 1e-3)) ** power

        length = 1 - decay if from_ else decay
        left = max(0.0, 1 - progress) if end else 1 - progress
        if not cooldown or left >= length:
            return root(progress)
        start = {"border": root(1 - length), "one": 1.0, "moving": root(progress)}[top]
        if cut:
            return max(floor, start * left / length)
        return floor + (start - floor) * left / length

    return wrong


def _lines(schedule: Any, points: list[float], **how: float) -> Tensor:
    return torch.tensor([float(schedule(p, **how)) for p in points], dtype=torch.float64)


def _number(yours: Any, expected: Any) -> Failure | None:
    if isinstance(yours, (int, float)) and not isinstance(yours, bool):
        return None
    return Failure(f"it returned a {type(yours).__name__}, expected a float")


C = Exercise(
    id="4.3.c",
    symbol="inverse_sqrt_cooldown",
    reference=inverse_sqrt_cooldown,
    look_again="Four shapes",
    probes=[
        Probe("a number comes back", lambda f: f(0.5), _number),
        Probe(
            "the warm-up and the root, by hand",
            lambda f: _lines(f, [0.0, 0.05, 0.1, 0.4], warmup=0.1, decay=0.5),
            equals(digits=3),
            given="progress 0, 0.05, 0.1, 0.4 with warmup 0.1, decay 0.5",
        ),
        Probe(
            "the cool-down, by hand",
            lambda f: _lines(f, [0.64, 0.73, 0.82, 0.91, 1.0], warmup=0.16, decay=0.36, floor=0.1),
            equals(digits=3),
            given="progress 0.64, 0.73, 0.82, 0.91, 1 with warmup 0.16, decay 0.36, floor 0.1",
        ),
        Probe(
            "a hundred points, as its defaults say",
            lambda f: _lines(f, [i / 100 for i in range(101)]),
            equals(digits=3),
        ),
        Probe(
            "past the end it stays at the floor",
            lambda f: _lines(f, [1.0, 1.01, 1.5, 3.0], warmup=0.1, decay=0.5, floor=0.2),
            equals(digits=3),
            given="progress 1, 1.01, 1.5, 3 with decay 0.5, floor 0.2",
        ),
        Probe(
            "no cool-down, no plateau, no room",
            lambda f: (
                _lines(f, [0.05, 0.25, 0.9, 1.0, 2.0], warmup=0.1, decay=0.0, floor=0.3),
                _lines(f, [0.25, 0.5, 0.75, 1.0], warmup=0.5, decay=0.5),
            ),
            equals(digits=3),
            given="decay 0 (and floor 0.3); then warmup and decay 0.5",
        ),
    ],
    misconceptions=[
        Misconception(
            "no root",
            _root(power=1.0),
            "The middle falls as 1/progress; it should fall as one over its square root, which is much slower.",
        ),
        Misconception(
            "counted from the end of the warm-up",
            _root(since="warm"),
            "The root counts from the end of the warm-up, so it does not begin at 1; progress counts from the start of the run.",
        ),
        Misconception(
            "no cool-down",
            _root(cooldown=False),
            "The root goes on to the end; the last `decay` of the run should be a line down to the floor.",
        ),
        Misconception(
            "a jump up to the peak",
            _root(top="one"),
            "The cool-down begins at 1, so the rate jumps up there; it begins where the root has got to, at progress 1 - decay.",
        ),
        Misconception(
            "a root that still falls",
            _root(top="moving"),
            "In the cool-down the root goes on falling while the line multiplies it, which bends the line; freeze the root at "
            "progress 1 - decay.",
        ),
        Misconception(
            "down to zero, cut at the floor",
            _root(cut=True),
            "The line goes to 0 and is cut off at the floor, so it gets there too early; the line itself should end at the "
            "floor.",
        ),
        Misconception(
            "no end",
            _root(end=False),
            "Past the end of the run the line goes on falling, below the floor; keep what is left at 0 or above.",
        ),
        Misconception(
            "decay is where it begins",
            _root(from_=True),
            "You read decay as the progress at which the cool-down begins; it is its length, so it begins at 1 - decay.",
        ),
    ],
    equivalent_mutants={
        "`progress < warmup` became `progress <= warmup`": "where the two meet, both are 1",
        "`max(0.0, 1 - progress)` became `max(1 - progress, 0.0)`": "the larger of two, in either order",
    },
)

EXERCISES = [A, B, C]

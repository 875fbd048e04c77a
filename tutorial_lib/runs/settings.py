"""Every setting that a run has, with its default and a sentence. `runs.config` reads them from a file and checks them."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, dataclass, field, fields, make_dataclass
from typing import Any, get_args, get_type_hints

from torch import nn

from tutorial_lib.kinds import kind_named

__all__ = [
    "Config",
    "DataTable",
    "LogTable",
    "ModelTable",
    "TrainTable",
    "model_config",
    "model_table",
    "new_model",
    "tables",
]


@dataclass
class TrainTable:
    """How to train. The learning rate's schedule is that of lesson 4.3, precision that of 4.2."""

    batch_size: int = 32
    """Sequences in an optimizer step, over all processes together."""
    micro_batch_size: int | None = None
    """Sequences that a device works on at once; the batch is accumulated from them. None: as many as it has to."""
    seq_len: int = 256
    """Tokens in a sequence."""
    steps: int = 1000
    """Optimizer steps."""
    init_from: str | None = None
    """A model to begin with, as `--model` names it: `smollm2`, a GGUF file, a Hugging Face folder, `owner/model` on the
    hub, a checkpoint. It brings its shape and its tokenizer: leave out the `model` table and `data.tokenizer`."""
    max_seconds: float | None = None
    """Stop after so much training time, if that comes first; the schedule then ends with the time."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `wsd` or `constant`."""
    warmup_steps: int = 100
    """Steps spent rising to the peak."""
    lr_floor: float = 0.1
    """The factor on the peak at the end."""
    optimizer: str = "adamw"
    """`adamw`, or `muon` for the matrices in the blocks with AdamW for the rest."""
    matrix_lr: float | None = None
    """Muon's peak rate; `lr` when None."""
    momentum: float = 0.95
    """Muon's memory."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's memory for the gradient and for its square."""
    weight_decay: float = 0.1
    """Pull of the matrices towards zero."""
    grad_clip: float | None = 1.0
    """The largest gradient norm that is let through; None for all."""
    amp: bool | str = False
    """Mixed precision: true for what suits the device, or `bf16` or `fp16`."""
    ema: float | None = None
    """Decay of an average of the weights that is kept, evaluated and saved as well (0.999, say)."""
    compile: bool = False
    """Whether torch.compile goes over the model first."""
    activation_checkpointing: bool = False
    """Whether blocks are computed again in backward, to save memory."""
    attention: str = "auto"
    """The attention kernel (lesson 4.6)."""
    parallel: str = "ddp"
    """`ddp`, `fsdp` or `deepspeed`, where torchrun starts several processes."""
    zero_stage: int = 2
    """DeepSpeed's: 2 cuts gradients and moments among the processes, 3 the weights, too."""
    device: str | None = None
    """`cpu`, `cuda`, `mps`; the best one there is when None."""
    seed: int = 0
    """Of the weights, the order of the data, and dropout."""
    eval_every: int = 250
    """Steps between two looks at the validation text."""
    eval_windows: int | None = 256
    """Sequences that are looked at, spread over the text; None for all of it."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a gain."""
    save_every: int = 250
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_best: int = 3
    """Of the others, those with the lowest validation loss that stay."""


@dataclass
class DataTable:
    """What to train on."""

    dataset: str = "shakespeare"
    """A corpus of ours, a pattern of text files, a folder of `llm-scratch tokenize`, or a pattern of tar files."""
    val: str | None = None
    """Another such text to validate on. None: the last tenth (a folder has its own)."""
    val_fraction: float = 0.1
    """How much the last tenth is."""
    tokenizer: str | None = None
    """`byte`, `gpt2`, or the path of a vocabulary of ours. None: the folder's own, or bytes."""


@dataclass
class LogTable:
    """What to write down, and where."""

    dir: str = "runs"
    """Runs go to folders in this one."""
    name: str | None = None
    """The run's folder; the configuration file's name when None."""
    every: int = 10
    """Steps between two rows of the log."""
    tensorboard: bool = True
    """Also write TensorBoard's event files."""
    wandb: bool = False
    """Also log to Weights & Biases; offline without a key or network."""
    project: str = "llm-scratch"
    """Its name there."""
    histograms: bool = False
    """Also log histograms of weights and gradients, at each evaluation."""
    prompt: str | None = None
    """At each evaluation, write down how the model continues this."""
    trace_at: int | None = None
    """Record a profiler trace of three steps from this one on."""


def model_table(kind: str) -> type:
    """The `model` table for a kind of model: its `kind`, and every field of its configuration.

    Raises:
        ValueError: if there is no such kind.
    """
    config = kind_named(kind).config
    hints = get_type_hints(config)
    shape = [
        (f.name, hints[f.name] if _is_plain(hints[f.name]) else Any, _default(f)) for f in fields(config)
    ]
    return make_dataclass("ModelTable", [("kind", str, kind), *shape])


def _default(of: Field) -> Any:
    return of.default if of.default_factory is MISSING else field(default_factory=of.default_factory)


def _is_plain(hint: Any) -> bool:
    """Whether OmegaConf knows this type; what it does not know, the model's own configuration checks."""
    return all(kind in (str, int, float, bool, type(None)) for kind in get_args(hint) or (hint,))


ModelTable = model_table("Transformer")


@dataclass
class Config:
    """A run. One of another sort has its own: `class RLConfig(Config)`, with a table more, each field a dataclass."""

    model: Any = field(default_factory=ModelTable)
    """A `model_table`."""
    train: TrainTable = field(default_factory=TrainTable)
    data: DataTable = field(default_factory=DataTable)
    log: LogTable = field(default_factory=LogTable)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and values, for a file or a log."""
        return asdict(self)


def tables(kind: str = "Transformer", shape: type[Config] = Config) -> dict[str, type]:
    """The tables of a run, by name."""
    others = {f.name: f.default_factory for f in fields(shape) if f.name != "model"}
    return {"model": model_table(kind), **others}


def model_config(config: Config) -> Any:
    """The model's part, as the model wants it: the configuration of its kind."""
    settings = asdict(config.model)
    return kind_named(settings.pop("kind")).config(**settings)


def new_model(config: Config) -> nn.Module:
    """A model of the kind and the shape that it asks for, with fresh weights."""
    return kind_named(config.model.kind).model(model_config(config))

"""DeepSpeed as another engine under the same trainer: ZeRO stages 1 to 3 (Rajbhandari et al. 2020), optional offload.

The trainer's step stays as it is. Three things go through the engine instead: forward, backward and the
optimizer's step. A checkpoint is the trainer's own: whole tensors, no pickle, any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutorial_lib.tools.expect import expect
from tutorial_lib.train.precision import Precision
from tutorial_lib.train.trainer import Trainer

__all__ = ["deepspeed_config", "deepspeed_trainer"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each weight."""


def deepspeed_config(
    stage: int = 2,
    micro_batch_size: int = 1,
    grad_clip: float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> dict[str, Any]:
    """What DeepSpeed wants to read, from what the course's settings say.

    Args:
        stage: What is cut among the processes: 1 the moments, 2 the gradients too, 3 the weights too.
        micro_batch_size: Rows that one process computes at once.
        grad_clip: The largest gradient norm that is let through; None for all.
        dtype: Of the weights that compute; those that are updated stay in fp32.
        offload: Keep the moments in the processor's memory.

    Raises:
        ValueError: for another stage or format.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"ZeRO stage {stage}? choose 1, 2 or 3")
    formats = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype not in formats:
        raise ValueError(f"DeepSpeed in {dtype}? choose float32, bfloat16 or float16")
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # how many pieces a batch has is the trainer's affair
        "gradient_clipping": grad_clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    if formats[dtype]:
        config[formats[dtype]] = {"enabled": True}
    return config


class _Model(nn.Module):
    """Forward through the engine; a state dict of whole tensors."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.inner = engine.module
        self.__dict__["engine"] = engine  # not a submodule: its parameters are the inner module's

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.engine(*args, **kwargs)

    def set_requires_gradient_sync(self, enabled: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(enabled)

    def _named(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by the model's own names; a tied layer has two."""
        named = dict(self.inner.named_parameters(remove_duplicate=False))
        return {name: named.get(name, tensor) for name, tensor in self.inner.state_dict().items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else tensor
            for name, tensor in self._named().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        for name, tensor in self._named().items():
            value = state[name].to(tensor.device, torch.float32)
            if not isinstance(tensor, nn.Parameter):
                tensor.copy_(value)
                continue
            safe_set_full_fp32_param(tensor, value)  # the piece that is updated, and the copy that computes
            with torch.no_grad(), deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(value)


class _Optimizer:
    """The groups as they were handed in, so that rates can be set and moments saved, parameter by parameter."""

    def __init__(self, groups: list[dict[str, Any]], engine: Any) -> None:
        self.param_groups, self.engine = groups, engine
        self.base = engine.optimizer.optimizer  # the one that was handed in: it now works on flat pieces

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.engine.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for mine, its in zip(self.param_groups, self.base.param_groups, strict=True):
            its["lr"] = mine["lr"]
        self.engine.step()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _link(self) -> None:
        # Stages 1 and 2 look for the moments once, after the first group's step, when other groups have none yet.
        zero = self.engine.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [entry["step"] for entry in self.base.state.values() if "step" in entry]
        if steps:
            self._link()
        numbers = iter(range(len(self._parameters())))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups
        ]
        moments = {
            i: {
                "step": torch.tensor(float(steps[0])),
                **{key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS},
            }
            for i, parameter in enumerate(self._parameters() if steps else [])
        }
        return {"state": moments, "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state["state"]:
            return
        entry = {"step": Tensor, **dict.fromkeys(MOMENTS, Tensor)}
        expect(state["state"], dict.fromkeys(range(len(self._parameters())), entry), "the optimizer's state")
        self._make_moments()
        self._link()
        for i, parameter in enumerate(self._parameters()):
            for key in MOMENTS:
                value = state["state"][i][key].to(self.engine.device, torch.float32)
                safe_set_full_optimizer_state(parameter, value, key)
        for entry in self.base.state.values():
            entry["step"] = torch.full_like(torch.as_tensor(entry["step"]), float(state["state"][0]["step"]))

    def _make_moments(self) -> None:
        """DeepSpeed makes them at the first step: so take one that changes nothing, with a rate of zero."""
        for group in self.base.param_groups:
            group["lr"] = 0.0
        self.engine.set_gradient_accumulation_boundary(True)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.engine.device)
        self.engine.backward(self.engine(ids).float().sum() * 0.0)
        self.engine.step()


class _Precision(Precision):
    """Backward, scaling, clipping and the step are the engine's."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.device)  # without our autocast: under 16 bits the weights themselves have 16
        self.engine = engine

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, optimizer: Any, parameters: Any, grad_clip: float | None = None) -> Tensor:
        optimizer.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())


def deepspeed_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    steps: int,
    stage: int = 2,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    micro_batch_size: int | None = None,
    grad_clip: float | None = 1.0,
    **others: Any,
) -> Trainer:
    """A trainer whose model, backward and step are DeepSpeed's. Call `distributed.start` first, under torchrun.

    Args:
        model: On this process's device, not wrapped.
        optimizer: Adam or AdamW on its parameters; DeepSpeed cuts its moments among the processes.
        batches: As for `Trainer`, like `steps`, `micro_batch_size` and what else is given.
        stage: As for `deepspeed_config`, like `dtype`, `offload` and `grad_clip`.

    Raises:
        ModuleNotFoundError: without DeepSpeed; the sentence says how to get it.
        ValueError: for a moving average (`ema`), which would need the weights in one piece.
    """
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'ZeRO through DeepSpeed needs an extra: pip install "llm-from-scratch[deepspeed]"'
        ) from None
    if others.get("ema"):
        raise ValueError(
            "DeepSpeed keeps the weights in pieces, and no moving average of them: leave ema out"
        )
    config = deepspeed_config(stage, micro_batch_size or 1, grad_clip, dtype, offload)
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Trainer(
        _Model(engine),
        _Optimizer(groups, engine),
        batches,
        steps,
        grad_clip=grad_clip,
        precision=_Precision(engine),
        micro_batch_size=micro_batch_size,
        **others,
    )

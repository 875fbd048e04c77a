"""`llm-scratch sft`: teach a model to answer, from conversations."""

from __future__ import annotations

from tutorial_lib.cli.common import run_alone
from tutorial_lib.cli.train import ConfigFile, DryRun, Overrides, Resume, carry_out_from
from tutorial_lib.runs.sft import SFTConfig, fine_tune

__all__ = ["sft"]


def sft(
    overrides: Overrides = None, config: ConfigFile = None, resume: Resume = False, dry_run: DryRun = False
) -> None:
    """Teach a model to answer: llm-scratch sft --config configs/sft.yaml data.dataset=conversations.jsonl

    Conversations are lines of JSON: {"messages": [...]}, or {"prompt": "...", "completion": "..."}. For several devices:
    torchrun --nproc-per-node 2 -m tutorial_lib.cli.sft --config configs/sft.yaml
    """
    carry_out_from(config, overrides or (), resume, dry_run, SFTConfig, fine_tune)


if __name__ == "__main__":
    run_alone(sft)

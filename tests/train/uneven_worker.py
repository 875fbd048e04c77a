"""What `tests/train/test_distributed.py` starts twice: two processes with unequal batches, which end at unequal times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.train.distributed import rank, start, stop
from tutorial_lib.train.objective import NextToken
from tutorial_lib.train.parallel import parallelize
from tutorial_lib.train.trainer import Trainer


class Told(NextToken):
    """Hands out its metrics in another order on each process: the number of rows, a one for each label, a mean over rows."""

    def loss(self, model, batch):
        loss, _ = super().loss(model, batch)
        rows, labels = torch.tensor(float(len(batch[0]))), self.count(batch)
        metrics = {"ones": labels, "rank_of_a_row": (rows * rank(), rows), "twos": 2 * labels}
        return loss, dict(sorted(metrics.items(), reverse=rank() == 1))


def main(folder: Path) -> None:
    start(torch.device("cpu"))
    torch.manual_seed(0)
    model = parallelize(Transformer(ModelConfig(16, 8, 16, 2, n_layers=1)), "ddp")
    ids = torch.randint(16, (4 if rank() == 0 else 2, 9))  # 32 labels here, 16 there
    batches = [(ids[:, :-1], ids[:, 1:])] * (5 if rank() == 0 else 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, 9, objective=Told())
    last = trainer.run()
    (folder / f"{rank()}.json").write_text(json.dumps({"step": last.step, "metrics": dict(last.metrics)}))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

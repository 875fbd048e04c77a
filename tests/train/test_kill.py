"""A run that is killed again and again ends with the same bits as one that was left alone.

`python tests/train/test_kill.py FOLDER SEED` does the killing, in a process of its own: it imports torch once and forks a
child for each life of the run. The parent never computes, and SIGKILL leaves a child no time for last words.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it at their first step: here once, and not in each child

import tutorial_lib.train.checkpoints as checkpoints
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.data.datasets import TokenWindows
from tutorial_lib.data.shuffle import ShuffledBatches
from tutorial_lib.eval.perplexity import evaluate
from tutorial_lib.tools.seeds import seed_everything
from tutorial_lib.train.checkpoint_folder import CheckpointFolder
from tutorial_lib.train.checkpoints import load_tree, save_tree
from tutorial_lib.train.optimizers import build_optimizer
from tutorial_lib.train.trainer import Trainer
from tutorial_lib.train.trees import flatten

STEPS, KILLS = 140, 50
TOKENS = np.random.default_rng(0).integers(0, 31, 400).astype(np.uint8)


def build() -> Trainer:
    """Everything that has a state: dropout, moments, an average of weights, a place in the data, a schedule."""
    seed_everything(0)  # Python seeds its generator anew in every forked child
    shape = {"vocab_size": 31, "max_seq_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 2, "dropout": 0.1}
    model = Transformer(ModelConfig(**shape))
    return Trainer(
        model,
        build_optimizer(model, lr=3e-3),
        ShuffledBatches(TokenWindows(TOKENS, 8), batch_size=4, seed=1),
        steps=STEPS,
        micro_batch_size=2,
        ema=0.9,
    )


def live(folder: Path, say: Callable[[bytes], None], steps: int = STEPS) -> Trainer:
    """One life: resume if there is anything, go on, save at most steps."""
    trainer, checkpoint = build(), CheckpointFolder(folder, keep_last=2, keep_best=2)
    found = checkpoint.newest(warn=lambda sentence: say(b"!"))
    if found is not None:
        trainer.load_state_dict(found[0])
    say(b"r")

    def after_step(info) -> bool:
        (
            torch.rand(3),
            random.random(),
            np.random.rand(),
        )  # a sample of text, a shuffle: it moves the generators
        if info.step % 4 != 1:
            say(b"(")
            loss = evaluate(trainer.model, TOKENS[:50], 8).loss
            checkpoint.save(info.step, trainer.state_dict(), loss=loss)
            say(b")")
        say(b".")
        return info.step >= steps

    trainer.run([after_step])
    return trainer


def fork(work: Callable[[], None]) -> int:
    """Run it in a child, which ends with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> int:
    """Wait for a child: 0, or a positive code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def final(trainer: Trainer, path: Path) -> None:
    state = trainer.state_dict()
    state["progress"].pop("seconds")  # time, and not part of what must be equal
    save_tree(path, state)


def uninterrupted(folder: Path) -> float:
    """The run that nobody disturbs. Returns the seconds that a step takes."""
    times: list[float] = []
    read, write = os.pipe()

    def work() -> None:
        def say(word: bytes) -> None:
            if word == b".":
                os.write(write, b"%.6f\n" % time.perf_counter())

        final(live(folder / "left_alone", say), folder / "expected.ckpt")

    pid = fork(work)
    os.close(write)
    with os.fdopen(read) as lines:
        times = [float(line) for line in lines]
    assert ended(pid) == 0
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def kill_at_random(folder: Path, seed: int, step_seconds: float) -> dict[str, int]:
    """Lives of a few steps, each killed at a random moment, until there were 50; the next may end the run."""
    draw, kills, in_save, resumed = random.Random(seed), 0, 0, 0
    while True:
        read, write = os.pipe()
        say = partial(os.write, write)
        pid = fork(lambda say=say: final(live(folder / "killed", say), folder / "got.ckpt"))
        os.close(write)
        heard = b""
        if kills < KILLS:
            marks = draw.choice(
                [0, 1, 2]
            )  # so many steps it may end; 0: it dies while it resumes, or soon after
            while heard.count(b".") < marks and (word := os.read(read, 1)):
                heard += word
            time.sleep(draw.uniform(0, 2 if marks == 0 else 1.2) * step_seconds)
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(read, "rb") as rest:
            heard += rest.read()
        code = ended(pid)
        assert b"!" not in heard, "a checkpoint was damaged"
        if code == 0:
            return {"kills": kills, "in_save": in_save, "resumed": resumed}
        assert code == -signal.SIGKILL, f"a life ended with {code}"
        kills += 1
        in_save += heard.count(b"(") > heard.count(b")")
        resumed += b"r" in heard


def with_a_trap(folder: Path, at: int | None, at_step: int) -> list[str]:
    """Live up to a step, and die there before the n-th thing that its save does to the disk; None: survive.

    Returns the names of what was done (in the child that survives, by way of a file).
    """
    done: list[str] = []
    state = {"armed": False}

    def watch(module, name: str) -> None:
        real = getattr(module, name)

        def trapped(*args, **options):
            if state["armed"]:
                if at == len(done):
                    if name == "save_file":  # half a file, and the end
                        real(*args, **options)
                        os.truncate(args[1], os.path.getsize(args[1]) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(name)
            return real(*args, **options)

        setattr(module, name, trapped)

    def work() -> None:
        for module, name in (
            (checkpoints, "save_file"),
            (os, "fsync"),
            (os, "replace"),
            (os, "link"),
            (Path, "unlink"),
        ):
            watch(module, name)
        real_save = CheckpointFolder.save

        def save(self, step, *args, **options):
            state["armed"] = step == at_step
            path = real_save(self, step, *args, **options)
            if step == at_step:
                if at is not None and at >= len(done):
                    os.kill(os.getpid(), signal.SIGKILL)
                (folder.parent / "done.json").write_text(json.dumps(done))
            state["armed"] = False
            return path

        CheckpointFolder.save = save
        live(folder, lambda word: None, steps=at_step)

    code = ended(fork(work))
    assert code == (0 if at is None else -signal.SIGKILL), f"trap {at} at step {at_step}: ended with {code}"
    return json.loads((folder.parent / "done.json").read_text())


def kill_inside_saves(folder: Path) -> dict[str, int]:
    """A kill before each single thing that a save does to the disk, and one after the last."""
    step, positions = 8, 0
    things = with_a_trap(folder / "trapped", None, step)  # retention is at work by now: something is removed
    assert {"save_file", "fsync", "replace", "link", "unlink"} <= set(things), things
    for at in range(len(things) + 4):  # a save may do a little more than that one did
        step += 2 if (step + 2) % 4 != 1 else 3
        with_a_trap(folder / "trapped", at, step)
        found = CheckpointFolder(folder / "trapped").newest(warn=pytest.fail)
        assert found is not None and found[0]["progress"]["step"] >= step - 2, "a whole checkpoint was lost"
        positions += 1
    got = folder / "got_trapped.ckpt"
    assert ended(fork(lambda: final(live(folder / "trapped", lambda word: None), got))) == 0
    leftovers = [p.name for p in (folder / "trapped").iterdir() if p.name.startswith(".")]
    assert not leftovers, leftovers
    return {"positions": positions, "things": len(things)}


def differences(a: Path, b: Path) -> list[str]:
    """Names of what is not equal, to the last bit."""
    (one, rest_a), (two, rest_b) = flatten(load_tree(a)[0]), flatten(load_tree(b)[0])
    odd = [
        n for n in one.keys() | two.keys() if n not in one or n not in two or not torch.equal(one[n], two[n])
    ]
    return odd + ([] if rest_a == rest_b else ["the plain values"])


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    os.fsync = (
        lambda handle: None
    )  # it guards against power cuts; SIGKILL takes nothing from the system's memory
    step_seconds = uninterrupted(folder)
    report = kill_at_random(folder, seed, step_seconds) | kill_inside_saves(folder)
    report["names"] = len(flatten(load_tree(folder / "expected.ckpt")[0])[0])
    report["random"] = differences(folder / "expected.ckpt", folder / "got.ckpt")
    report["placed"] = differences(folder / "expected.ckpt", folder / "got_trapped.ckpt")
    print(json.dumps(report))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_fifty_times_ends_with_the_same_bits(tmp_path, record_property):
    command = [sys.executable, __file__, str(tmp_path), "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    print(report)
    assert report["kills"] >= KILLS and report["names"] > 50
    assert report["random"] == [] and report["placed"] == []
    assert report["positions"] > report["things"] >= 10


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

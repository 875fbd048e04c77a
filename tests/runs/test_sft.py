"""`llm-scratch sft`: from a checkpoint to a model that answers, resumed bit for bit, and understood by others."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.train.test_distributed import ROOT, largest_difference, launch, needs_gloo
from tutorial_lib.cli.main import app
from tutorial_lib.core.model import ModelConfig, Transformer
from tutorial_lib.eval.right_answers import ask, held_out_problems, score_by_task
from tutorial_lib.interop.checkpoint import load_model, save_model
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.runs.config import ConfigError, load_config
from tutorial_lib.runs.sft import SFTConfig, fine_tune
from tutorial_lib.sft.chat_format import CHAT, END
from tutorial_lib.train.checkpoints import load_tree

SHAPE = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "qk_norm": True}
TRAIN = {
    "batch_size": 4,
    "seq_len": 64,
    "steps": 6,
    "eval_every": 3,
    "save_every": 3,
    "warmup_steps": 1,
    "eval_windows": 8,
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.manual_seed(0)
    save_model("base.ckpt", Transformer(ModelConfig(**SHAPE)), {"tokenizer": "byte"})
    return tmp_path


def config_file(home: Path, name: str = "a", **tables) -> Path:
    settings = {
        "train": TRAIN | {"init_from": "base.ckpt"} | tables.pop("train", {}),
        "sft": {"n_problems": 200},
    }
    settings["log"] = {"tensorboard": False, "prompt": "Reverse: lord"}
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | tables))
    return path


def command(*words: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("pack", [True, False])
def test_a_run_learns_to_answer_is_resumed_bit_for_bit_and_chats(home, pack):
    path = config_file(home, sft={"n_problems": 200, "pack": pack})
    said = command("sft", "--config", path)
    assert "was never taught to chat: it gets the course's template" in said and "200 conversations" in said
    folder = home / "runs/a"
    assert any(row.get("val/accuracy") or row.get("accuracy") for row in metrics(folder)), metrics(folder)[-1]

    # The same with a stop half-way.
    command("sft", "--config", path, "log.name=b", "train.steps=6", "train.save_every=3")
    for file in ("step_00000006.ckpt", "latest.ckpt", "best.ckpt"):
        (home / "runs/b" / file).unlink(missing_ok=True)
    assert "going on from runs/b/step_00000003.ckpt" in command(
        "sft", "--config", path, "log.name=b", "--resume"
    )
    whole, resumed = (load_tree(home / f"runs/{name}/step_00000006.ckpt")[0] for name in "ab")
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name

    found = open_pretrained(folder / "latest.ckpt")
    assert found.template.source == CHAT and found.stop_ids == {found.tokenizer.specials[END]}
    assert found.model.config.vocab_size == 260
    result = CliRunner().invoke(
        app, ["chat", "--ckpt", str(folder / "latest.ckpt"), "--max-new-tokens", "3"], input="hi\n"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(command("eval", "--ckpt", folder / "latest.ckpt", "--problems", 2, "--json"))
    assert set(told["tasks"]) == {problem.task for problem in held_out_problems(1)}


def test_a_run_goes_on_only_with_its_own_conversations(home):
    path = config_file(home)
    command("sft", "--config", path, "train.steps=3")
    said = command("sft", "--config", path, "--resume", "sft.n_problems=201", ok=False)
    assert "has train.seed or the text changed?" in said or "are not those that the run began with" in said


def test_conversations_of_ones_own_with_questions_held_out(home):
    lines = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(200)] * 2  # every question twice
    (home / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = command("sft", "--config", config_file(home, data={"dataset": "mine.jsonl"}))
    learn, measure = _counts(said)
    assert learn + measure == 400 and measure % 2 == 0 and 10 < measure < 90, said


def _counts(said: str) -> tuple[int, int]:
    learn = re.search(r"([\d,]+) conversations of", said)
    measure = re.search(r"([\d,]+) to validate on", said)
    assert learn and measure, said
    return int(learn[1].replace(",", "")), int(measure[1].replace(",", ""))


def test_others_read_what_was_taught(home):
    """`transformers` writes the same conversation down, and answers as we do, from the exported folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command("sft", "--config", config_file(home))
    ckpt = home / "runs/a/latest.ckpt"
    command("export", home / "out", "--ckpt", ckpt)
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(home / "out"),
        AutoTokenizer.from_pretrained(home / "out"),
    )
    question = [{"role": "user", "content": "Reverse: lord"}]
    ours = open_pretrained(ckpt)
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert ids["input_ids"][0].tolist() == ours.template.encode(ours.tokenizer, question)
    assert tokenizer.eos_token == END
    written = theirs.generate(
        **ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    (mine,) = ask(ours, ["Reverse: lord"], 12)
    assert answer == mine


def test_a_model_that_chats_already_keeps_its_own_way(home):
    command("sft", "--config", config_file(home))
    said = command("sft", "--config", config_file(home, "c", train={"init_from": "runs/a/latest.ckpt"}))
    assert "never taught" not in said
    assert open_pretrained(home / "runs/c/latest.ckpt").model.config.vocab_size == 260


def test_experts_are_balanced_while_they_learn_to_answer(home):
    model = {"kind": "MoETransformer", "n_experts": 4}
    command("sft", "--config", config_file(home, model=model))
    row = next(row for row in reversed(metrics(home / "runs/a")) if row.get("balance_loss"))
    assert float(row["max_load"]) >= 1 and float(row["balance_loss"]) > 0.9
    model, _ = load_model(home / "runs/a/latest.ckpt")
    assert type(model).__name__ == "MoETransformer" and model.config.vocab_size == 260


def test_a_model_from_nothing(home):
    command(
        "sft", "--config", config_file(home, model=SHAPE | {"vocab_size": 256}, train={"init_from": None})
    )
    assert open_pretrained(home / "runs/a/latest.ckpt").model.config.vocab_size == 260


def test_too_long_and_empty_conversations_are_told(home):
    lines = [{"prompt": "x" * 100, "completion": "yes"}] * 30 + [
        {"prompt": f"a{i}", "completion": "b"} for i in range(30)
    ]
    (home / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = command("sft", "--config", config_file(home, data={"dataset": "mine.jsonl", "val": "problems"}))
    assert "30 of 60 conversations to learn from have more than train.seq_len=64 tokens" in said


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"prompt": "a", "completion": "b"}', "{"], "mine.jsonl, line 2: it is no JSON"),
        (['{"prompt": "a", "completion": "b"}'], "name another file in data.val"),
        ([], "there is no conversation in mine.jsonl"),
    ],
)
def test_what_cannot_be_learned_from_is_one_sentence_and_nothing_is_written(home, lines, said):
    (home / "mine.jsonl").write_text("\n".join(lines))
    found = command("sft", "--config", config_file(home, data={"dataset": "mine.jsonl"}), ok=False)
    assert said in found and not (home / "runs").exists() and "Traceback" not in found


def test_a_wrong_setting_names_the_nearest(home):
    with pytest.raises(ConfigError, match=r"there is no setting 'sft.packs': did you mean 'sft.pack'"):
        load_config(config_file(home, sft={"packs": True}), (), SFTConfig)


def test_held_out_problems_are_all_different_and_scored_by_task():
    problems = held_out_problems(5)
    assert len({problem.prompt for problem in problems}) == len(problems) == 55
    scores = score_by_task(problems, [problem.answer if i % 2 else "?" for i, problem in enumerate(problems)])
    assert [one.n for one in scores.values()] == [5] * 11
    assert sum(one.right for one in scores.values()) == 27
    assert scores["repeat"].error == pytest.approx(
        (scores["repeat"].share * (1 - scores["repeat"].share) / 5) ** 0.5
    )


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(("how", "pack"), [("ddp", "true"), ("fsdp", "false")])
def test_two_processes_learn_what_one_learns(home, how, pack):
    """Their batches hold other numbers of learned tokens, and padded ones are of other lengths."""
    path = config_file(home, model=SHAPE | {"vocab_size": 260}, train={"init_from": None, "batch_size": 8})
    more = (f"train.parallel={how}", f"sft.pack={pack}")
    command("sft", "--config", path, "log.name=one", *more)
    launch("-m", "tutorial_lib.cli.sft", "--config", str(path), "log.name=two", *more)
    one, two = (load_tree(home / f"runs/{name}/latest.ckpt")[0]["model"] for name in ("one", "two"))
    assert largest_difference(one, two) < 1e-5


@pytest.mark.slow
def test_the_shipped_configuration_teaches_what_it_promises(home):
    """A model that has never read a text learns the easiest tasks in two minutes of one core; the world's floor is 0."""
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "d_mlp": 176, "max_seq_len": 128, "qk_norm": True}
    settings = load_config(
        ROOT / "configs/sft.yaml",
        ["train.steps=400", "train.max_seconds=null", "train.batch_size=16"],
        SFTConfig,
    )
    settings.model = load_config(None, [f"model.{k}={v}" for k, v in shape.items()]).model
    settings.sft.n_problems, settings.log.dir, settings.log.name, settings.log.tensorboard = (
        20_000,
        str(home),
        "x",
        False,
    )
    fine_tune(settings)
    problems = [p for p in held_out_problems(40) if p.task in ("first", "upper", "repeat")]
    scores = score_by_task(
        problems, [*ask(open_pretrained(home / "x/latest.ckpt"), [p.prompt for p in problems])]
    )
    assert scores["first"].share > 0.7, scores
    assert sum(one.right for one in scores.values()) / len(problems) > 0.4, scores

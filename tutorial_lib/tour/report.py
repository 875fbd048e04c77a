"""The report: one HTML file with its pictures inside, readable anywhere, for as long as there are browsers."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutorial_lib.files import write_text
from tutorial_lib.tour.run import Story
from tutorial_lib.viz import COLOURS, use_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["baselines_picture", "loss_picture", "write_report"]

PLAIN_RUN = Path(__file__).with_name("plain_run.json")
"""What `python -m tutorial_lib.tour --recipe plain` gave on one machine, which the file names."""


def plain_run(story: Story) -> dict[str, Any] | None:
    """The plain recipe's measured run, if `story` may be compared with it (same text, the tour's recipe)."""
    if story.dataset != "shakespeare" or story.recipe["name"] != "tour":
        return None
    return json.loads(PLAIN_RUN.read_text(encoding="utf-8"))


def _smooth(values: list[float], memory: float = 0.97) -> list[float]:
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = memory * mean + (1 - memory) * value, memory * weight + (1 - memory)
        out.append(mean / weight)
    return out


def loss_picture(story: Story) -> Figure:
    """Loss against training time, with the plain recipe's curve, and counting as level lines."""
    import matplotlib.pyplot as plt

    use_style()
    figure, ax = plt.subplots(figsize=(8.0, 4.2))
    if story.train_curve:
        seconds, losses = zip(*story.train_curve, strict=True)
        ax.plot(seconds, _smooth(list(losses)), color=COLOURS["train"], label="training (smoothed)")
    if plain := plain_run(story):
        seconds, losses = zip(*plain["val_curve"], strict=True)
        label = f"validation of the plain recipe, measured on {plain['machine'].split(',')[0]}"
        ax.plot(seconds, losses, "o-", color=COLOURS["baseline"], markersize=3, linewidth=1.5, label=label)
    seconds, losses = zip(*story.val_curve, strict=True)
    ax.plot(seconds, losses, "o-", color=COLOURS["val"], markersize=4, label="validation")
    levels = {
        name: story.baselines[name] * math.log(2) for name in ("unigram", "bigram") if name in story.baselines
    }
    for name, level in levels.items():
        ax.axhline(level, color=COLOURS["baseline"], linestyle="--", linewidth=1.2)
        ax.annotate(
            name, (1.0, level), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=9, color="#5c677d",
        )  # fmt: skip
    ax.set(xlabel="seconds of training", ylabel="loss (nats per byte)", title="Learning Shakespeare")
    if story.dataset != "shakespeare":
        ax.set_title("Learning")
    lowest = min([*losses, *levels.values()])
    ax.set_ylim(max(0.0, lowest - 0.15), 4.0 if losses[-1] < 3.0 else 6.0)  # the first fall is steep: cut it
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 1.0))
    return figure


def baselines_picture(story: Story) -> Figure:
    """Bits per byte of the model beside counting and compressors."""
    import matplotlib.pyplot as plt

    use_style()
    assert story.bits_per_byte is not None
    rows = sorted([*story.baselines.items(), ("this model", story.bits_per_byte)], key=lambda row: -row[1])
    figure, ax = plt.subplots(figsize=(8.0, 0.45 * len(rows) + 0.9))
    names, values = zip(*rows, strict=True)
    colours = [COLOURS["accent" if name == "this model" else "baseline"] for name in names]
    ax.barh(names, values, color=colours)
    for i, value in enumerate(values):
        ax.text(value + 0.06, i, f"{value:.2f}", va="center", fontsize=10)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    ax.set(xlim=(0, 8.8), xlabel="bits per byte of the validation text (lower is better)")
    ax.set_title("How well is unseen text predicted?")
    return figure


def _embed(figure: Figure, alt: str, keep: Path) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    keep.write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _rows(values: dict[str, object]) -> str:
    return "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in values.items()
    )


def write_report(story: Story, folder: Path) -> Path:
    """Write `report.html` (and its pictures as files of their own), and return its path."""
    parts = [*_learning(story, folder), *_baselines(story, folder), *_samples(story), *_facts(story)]
    path = folder / "report.html"
    write_text(path, _PAGE.replace("{{body}}", "\n".join([*parts, _how_to_use(folder)])))
    return path


def _learning(story: Story, folder: Path) -> Iterator[str]:
    if story.loss is None:
        yield "<p class=lead>The run was stopped early. Its checkpoints are in this folder and can be used.</p>"
    else:
        yield (
            f"<p class=lead>After {story.seconds:.0f} seconds of training the model predicts text it has never seen "
            f"at <b>{story.loss:.3f} nats per byte</b> ({story.bits_per_byte:.2f} bits).</p>"
        )
    yield _embed(loss_picture(story), "Loss against seconds of training", folder / "loss.png")
    if plain := plain_run(story):
        yield (
            f"<p>For comparison, the usual AdamW recipe for a small GPT (four layers, 2000 steps of "
            f"12×64 bytes, peak rate 1e-3) ended at {plain['loss']:.3f} nats per byte after "
            f"{plain['seconds']:.0f} seconds on {html.escape(plain['machine'])}. Same loop, same text. What differs: "
            "a modern architecture (RMSNorm, RoPE, SwiGLU, QK-norm), Muon for the matrices, a context twice as long, "
            "rates that were searched for, and the seconds. <code>python -m tutorial_lib.tour.ladder</code> takes the "
            "difference apart; "
            "<code>python -m tutorial_lib.tour --recipe plain</code> measures it here.</p>"
        )


def _baselines(story: Story, folder: Path) -> Iterator[str]:
    if story.bits_per_byte is None:
        return
    yield _embed(baselines_picture(story), "Bits per byte beside baselines", folder / "baselines.png")
    yield (
        "<p>Uniform knows nothing. Unigram and bigram count single bytes and pairs in the training text. "
        "gzip, xz and bzip2 compress the validation text alone; “having read the training text” gives xz the "
        "training text first, which is what the model had.</p>"
    )
    numbers = sorted([*story.baselines.items(), ("this model", story.bits_per_byte)], key=lambda row: row[1])
    yield f"<table>{_rows({name: f'{bits:.3f} bits per byte' for name, bits in numbers})}</table>"


def _samples(story: Story) -> Iterator[str]:
    yield "<h2>What it writes</h2><div class=samples>"
    for progress, step, text in story.samples:
        caption = f"<figcaption>step {step}, {progress:.0%}</figcaption>"
        yield f"<figure>{caption}<pre>{html.escape(text)}</pre></figure>"
    yield "</div>"


def _facts(story: Story) -> Iterator[str]:
    facts = {
        "machine": story.machine,
        "text": f"{story.dataset}: {story.train_bytes:,} bytes to train on, the last {story.val_bytes:,} to validate on",
        "parameters": f"{story.parameters:,}",
        "steps": f"{story.steps:,} of {story.recipe['batch_size']} × {story.recipe['model']['max_seq_len']} bytes",
        "speed": f"{story.tokens / max(story.seconds, 1e-9):,.0f} tokens/s",
        "seed": story.seed,
    }
    settings = {f"model.{k}": v for k, v in story.recipe["model"].items()}
    settings |= {f"train.{k}": v for k, v in story.recipe["training"].items()}
    settings["train.batch_size"] = story.recipe["batch_size"]
    yield f"<h2>The run</h2><table>{_rows(facts)}</table>"
    yield f"<details><summary>The whole configuration</summary><table>{_rows(settings)}</table></details>"


def _how_to_use(folder: Path) -> str:
    best = html.escape((folder / "best.safetensors").as_posix())
    return (
        "<h2>Use it</h2><pre class=code>from tutorial_lib.interop.checkpoint import load_model\n"
        "from tutorial_lib.data.tokenize import ByteTokenizer\n"
        "from tutorial_lib.runs.callbacks import write_on\n\n"
        f'model, about = load_model("{best}")\n'
        'print(write_on(model, ByteTokenizer(), "**ROMEO**  \\n", n=500))</pre>'
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>The tour: a Transformer learns to write</title>
<style>
 body { font: 16px/1.6 system-ui, sans-serif; max-width: 54rem; margin: 0 auto; padding: 0 1rem 4rem; color: #222 }
 header { background: linear-gradient(100deg, #4361ee, #7b2cbf 55%, #f3722c); color: white; border-radius: 0 0 14px 14px;
          padding: 1.4rem 1.6rem; margin-bottom: 1.4rem }
 h1 { margin: 0; font-size: 1.7rem } h2 { margin-top: 2.2rem; font-size: 1.25rem }
 .lead { font-size: 1.12rem } img { max-width: 100%; height: auto }
 .samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem }
 figure { margin: 0; border: 1px solid #ddd; border-radius: 10px; overflow: hidden }
 figcaption { background: #f3f4f8; padding: .35rem .8rem; font-weight: 600 }
 pre { margin: 0; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
 pre.code { background: #f3f4f8; border-radius: 10px }
 table { border-collapse: collapse; font-size: .93rem } td { padding: .2rem 1rem .2rem 0; vertical-align: top }
 td:first-child { color: #666; white-space: nowrap }
</style>
<header><h1>The tour</h1>A Transformer that you can read line by line learns to write.</header>
{{body}}
</html>
"""

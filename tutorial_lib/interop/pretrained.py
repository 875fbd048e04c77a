"""A model by its name, whatever it is written in, with all that it takes to talk to it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tutorial_lib.core.gpt import GPT
from tutorial_lib.core.model import Transformer
from tutorial_lib.data.adapters import HuggingFaceTokenizer, read_tokenizer_config
from tutorial_lib.data.corpora import MODELS, fetch
from tutorial_lib.interop.checkpoint import load_model
from tutorial_lib.interop.gguf import gguf_tokenizer, load_gguf
from tutorial_lib.interop.gguf_file import GGUFFile
from tutorial_lib.interop.hf import load_hf, read_config
from tutorial_lib.interop.hub import download, looks_like_hub_id
from tutorial_lib.interop.layout import lay_out, put_laid_out
from tutorial_lib.interop.tokenizers import Tokenizer, load_tokenizer
from tutorial_lib.interop.weights import Put, WeightsError, put
from tutorial_lib.quant.int8 import put_int8, to_int8
from tutorial_lib.serve.template import PLAIN, ChatTemplate, TemplateProblem
from tutorial_lib.tools.devices import pick_device
from tutorial_lib.train.checkpoints import read_header

__all__ = ["DTYPES", "Pretrained", "open_pretrained"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
"""What weights are kept in. With int8, the matrices are, and what flows between them is fp32."""

PICKLES = (".bin", ".pt", ".pth", ".pkl")
PICKLE = "{} is a pickle, which can run code when it is read: only safetensors and GGUF are"


@dataclass
class Pretrained:
    """A model and its manners."""

    model: Transformer | GPT
    """Of any kind that is known (`tutorial_lib.kinds`)."""
    tokenizer: Tokenizer
    tokenizer_name: str
    """As `load_tokenizer` wants it."""
    template: ChatTemplate
    """How it was taught to chat; a plain script if it was not."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    about: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint of ours says about itself."""
    folder: Path = Path()
    """Where it was found."""

    @property
    def chats(self) -> bool:
        """Whether it was taught to: it has a template of its own."""
        return self.template.source != PLAIN

    @property
    def starts(self) -> list[int]:
        """What stood before every text that the model was trained on: BOS, with Llama and Mistral."""
        return self.tokenizer.starts if isinstance(self.tokenizer, HuggingFaceTokenizer) else []


def open_pretrained(
    name: str | Path, dtype: str = "fp32", device: torch.device | str = "cpu", to_write: bool = False
) -> Pretrained:
    """Open a model: the one door for all of them.

    Args:
        name: `smollm2`; a GGUF file; a folder with a Hugging Face checkpoint; a checkpoint of ours; or
            `owner/model` on the Hugging Face hub.
        dtype: `fp32`, `bf16`, `fp16` or `int8`.
        device: Where.
        to_write: It is going to write token by token: its matrices are laid out for that, see `interop.layout`.

    Raises:
        WeightsError, CheckpointError, CorpusError, ValueError: if it cannot be had, or is not what it should be.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    device = pick_device(str(device))  # says so if this machine has none
    opener, path = _find(str(name))
    found = opener(path, dtype, device, to_write)
    if str(name) in MODELS:
        found.tokenizer_name = str(name)
    return found


def _find(name: str) -> tuple[Callable[..., Pretrained], Path]:
    """How the thing with this name is opened, and where it is on this machine, fetched if need be."""
    path = fetch(name) if name in MODELS else Path(name).expanduser()
    suffix = path.suffix.lower()
    if name and path.is_dir():
        return _open_folder, path
    if suffix == ".gguf":
        return _open_gguf, path
    if path.is_file() or suffix in (".ckpt", ".safetensors"):
        return _open_checkpoint, path
    # Where there is a folder of the owner's name, something in it is meant.
    if looks_like_hub_id(name) and suffix not in PICKLES and not path.parent.is_dir():
        return _open_folder, download(name)
    known = ", ".join(MODELS)
    near = difflib.get_close_matches(name.lower(), MODELS, n=1) or _beside(path)
    if near:
        raise WeightsError(f"there is no model {name!r}: did you mean {near[0]!r}?")
    raise WeightsError(
        f"there is no model {name!r}: give {known}, a .gguf file, a folder with config.json, a .ckpt file or "
        "owner/model"
    )


def _beside(path: Path) -> list[str]:
    """What is in the same folder, is a folder or looks like a model, and comes nearest by its name."""
    if not path.name or not path.parent.is_dir():
        return []
    names = [p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix in (".ckpt", ".gguf")]
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=1)]


def _put(dtype: str, to_write: bool) -> Put:
    """What is done with each weight of somebody else's."""
    return put_int8 if dtype == "int8" else put_laid_out if to_write else put


def _open_gguf(path: Path, dtype: str, device: torch.device, to_write: bool) -> Pretrained:
    file = GGUFFile(path)
    tokenizer = gguf_tokenizer(file)
    source = file.metadata.get("tokenizer.chat_template")
    ends = [file.metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("eot", "eom")]
    ends = [i for i in ends if isinstance(i, int)]  # of a turn, of a message: Llama 3 ends an answer so
    model = load_gguf(file, dtype=DTYPES[dtype], device=device, put=_put(dtype, to_write))
    return _ready(model, tokenizer, str(path), source, ends, path.parent)


def _open_folder(folder: Path, dtype: str, device: torch.device, to_write: bool) -> Pretrained:
    if not (folder / "config.json").is_file():
        latest, theirs = (
            folder / "latest.ckpt",
            "a Hugging Face checkpoint has, a run of ours is its .ckpt file",
        )
        hint = f"did you mean {latest}?" if latest.is_file() else theirs
        raise WeightsError(f"{folder} has no config.json: {hint}")
    if not (folder / "tokenizer.json").is_file():
        raise WeightsError(f"{folder} has no tokenizer.json, without which nobody can read to it")
    name = str(folder / "tokenizer.json")  # and not the folder, which may be called gpt2
    tokenizer = load_tokenizer(name)
    model = load_hf(folder, dtype=DTYPES[dtype], device=device, put=_put(dtype, to_write))
    return _ready(model, tokenizer, name, _template_in(folder), _ends_in(folder), folder)


def _open_checkpoint(path: Path, dtype: str, device: torch.device, to_write: bool) -> Pretrained:
    """One of ours; the average of its weights, if the run kept one."""
    if path.suffix.lower() in PICKLES:
        raise WeightsError(PICKLE.format(path))
    if path.suffix == ".safetensors" and path.is_file() and "tree" not in read_header(path):
        raise WeightsError(f"{path} has only numbers: give the folder that has its config.json, too")
    model, about = load_model(path, device)
    if dtype == "int8":
        if not isinstance(model, Transformer):
            raise WeightsError(
                f"{path} holds a {type(model).__name__}: int8 is for the Transformer of lesson 3.6"
            )
        model = to_int8(model)
    else:
        model = model.to(DTYPES[dtype])
        if to_write:
            lay_out(model)
    name = about.get("tokenizer", "byte")
    tokenizer = load_tokenizer(name, path.parent)
    return _ready(model, tokenizer, name, _template_in(path.parent), None, path.parent, about)


def _template_in(folder: Path) -> str | None:
    source = folder / "chat_template.jinja"
    if source.is_file():
        return source.read_text(encoding="utf-8", errors="replace")
    found = read_tokenizer_config(folder).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next(
            (t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return found


def _ends_in(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (ends := read_config(folder / name).get("eos_token_id")) is not None:
            ends = ends if isinstance(ends, list) else [ends]
            return [i for i in ends if isinstance(i, int)]
    return []


def _ready(
    model: Transformer | GPT,
    tokenizer: Tokenizer,
    tokenizer_name: str,
    source: str | None,
    ends: list[int] | None,
    folder: Path,
    about: dict[str, Any] | None = None,
) -> Pretrained:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise WeightsError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only {model.config.vocab_size:,} rows"
        )
    stops = {tokenizer.eos_id, *(ends or ())} - {None}
    specials = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        specials = {"eos_token": tokenizer.eos or "", "bos_token": tokenizer.bos or ""}
    if isinstance(source, str) and source:
        template, stop = _template(source, specials), ()
    else:  # a model that was never taught to chat would go on with the other's lines
        template, stop = ChatTemplate(PLAIN), ("\nUser:",)
    return Pretrained(model, tokenizer, tokenizer_name, template, frozenset(stops), stop, about or {}, folder)


def _template(source: str, specials: dict[str, str]) -> ChatTemplate:
    """A template that cannot be read is an error when it is asked for, and not before: one can do without it."""
    try:
        return ChatTemplate(source, specials)
    except TemplateProblem as error:
        template = ChatTemplate(f"{{{{ raise_exception({json.dumps(str(error))}) }}}}")
        template.source = source
        return template

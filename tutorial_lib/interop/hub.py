"""A model by its name on the Hugging Face hub, downloaded once: its configuration, tokenizer and safetensors only."""

from __future__ import annotations

import re
from pathlib import Path

from tutorial_lib.interop.weights import WeightsError

__all__ = ["download", "looks_like_hub_id"]

WANTED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
]
"""Nothing that could run code: no pickles, no Python."""


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` could be `owner/model`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def download(name: str, revision: str | None = None) -> Path:
    """The folder with the model's files, in Hugging Face's own cache.

    Args:
        revision: A branch, tag or commit; `main` when None.

    Raises:
        WeightsError: if there is no such model, no network, no leave, or no safetensors among its files.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise WeightsError(
            "models from the hub need the package huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except GatedRepoError:
        raise WeightsError(
            f"{name} is given only to those who asked: accept its terms on the hub, and log in"
        ) from None
    except RepositoryNotFoundError:
        raise WeightsError(
            f"there is no file or folder {name}, and the hub has no model of that name that you may read: is it spelled right?"
        ) from None
    except LocalEntryNotFoundError:
        raise WeightsError(
            f"there is no file or folder {name}, nor such a model in the cache, and the hub cannot be reached: check "
            "the name, or the network"
        ) from None
    except Exception as error:  # many kinds of connections fail in many ways
        said = re.sub(r"\w+://\S+|host='[^']*'", "…", " ".join(str(error).split()))[:160]
        raise WeightsError(
            f"{name} could not be downloaded from the hub ({type(error).__name__}: {said})"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{name} has no safetensors on the hub, and nothing else is read")
    return folder

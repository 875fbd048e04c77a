# Exported from chapters/part_4_scaling_up/4_4_checkpoint_and_resume.ipynb.
# Edit the lesson, then run: make export
"""A tree of dicts, lists and tensors, taken apart into named tensors and JSON, and put together again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["flatten", "unflatten"]


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Take a tree apart: its tensors by name (`optimizer.state.0.exp_avg`), and the rest as JSON.

    A tensor that is in the tree twice (a tied output layer) is stored once. The tensors are not copied.

    Raises:
        TypeError: at anything but dicts, lists, tuples, tensors, text, numbers, bools and None.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple, str] = {}

    def describe(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            same = (node.data_ptr(), node.shape, node.stride(), node.dtype, node.device)
            if node.numel() and same in seen:
                return {"tensor": seen[same]}
            while (
                name in tensors or name == "__metadata__"
            ):  # {"a": {"b": …}, "a.b": …}: two tensors, one name
                name += "_"
            tensors[name], seen[same] = node.detach(), name
            return {"tensor": name}
        inside = f"{name}." if name else ""
        if isinstance(
            node, Mapping
        ):  # as pairs: the keys of an optimizer's state are numbers, JSON's are text
            for key in node:
                if not isinstance(key, (str, int)):
                    raise TypeError(
                        f"a key in {name or 'the tree'} is a {type(key).__name__}: use text or integers"
                    )
            return {"dict": [[key, describe(value, f"{inside}{key}")] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [describe(value, f"{inside}{i}") for i, value in enumerate(node)]}
        if node is None or isinstance(node, (str, bool, int, float)):
            return node
        raise TypeError(
            f"{name} is a {type(node).__name__}: a checkpoint holds tensors and plain values only"
        )

    return tensors, describe(tree, "")


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Put a tree together again: the inverse of `flatten`.

    Raises:
        ValueError: if the skeleton is none of `flatten`'s.
        KeyError: if it names a tensor that is not there.
    """

    def build(node: Any) -> Any:
        if isinstance(node, dict) and len(node) == 1:
            ((kind, inside),) = node.items()
            if kind == "tensor" and isinstance(inside, str):
                return tensors[inside]
            if kind == "dict" and isinstance(inside, list):
                return {key: build(value) for key, value in inside}
            if kind in ("list", "tuple") and isinstance(inside, list):
                return (tuple if kind == "tuple" else list)(map(build, inside))
        if isinstance(node, (dict, list)):
            raise ValueError("this is not the skeleton of a tree")
        return node

    return build(skeleton)

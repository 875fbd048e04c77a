"""The exporter: lessons in, modules out that read as if written by hand; every mistake one sentence."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from nbformat import v4

from tutorial_lib.nb import export
from tutorial_lib.nb.notebooks import dumps

ROPE = "chapters/part_3_modernizing/3_2_rope.ipynb"
NORMS = "chapters/part_3_modernizing/3_1_norms.ipynb"
FIRST = '#| default_exp core.rope\n#| export\n"""Rotary positions."""\nimport math\n'
GOOD = FIRST + "A = math.pi"


def write_lesson(root: Path, notebook: str, *cells: str) -> None:
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# A lesson"), *map(v4.new_code_cell, cells)])
    (root / notebook).parent.mkdir(parents=True, exist_ok=True)
    (root / notebook).write_text(dumps(nb), encoding="utf-8")


def write_module(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def snapshot(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted((root / "tutorial_lib").rglob("*.py"))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_module(tmp_path, "tutorial_lib/__init__.py", "")
    write_module(tmp_path, "tutorial_lib/core/__init__.py", "")
    (tmp_path / "chapters").mkdir()
    return tmp_path


def run(root: Path, *options: str) -> int:
    return export.main(["--root", str(root), *options])


def refused(root: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """Export must fail with one sentence that holds all `parts`, and must leave the package as it was."""
    before = snapshot(root)
    assert run(root) == 1
    assert snapshot(root) == before
    told = [line for line in capsys.readouterr().err.splitlines() if all(part in line for part in parts)]
    assert len(told) == 1, f"no single sentence with {parts}"
    return told[0]


def test_a_module_reads_as_if_written_by_hand(root: Path) -> None:
    write_lesson(
        root,
        ROPE,
        "print('play')",
        """#| default_exp core.rope
#| export
'''Rotary positions.'''
from __future__ import annotations
import torch
import os
from torch import nn
import math
from torch import Tensor

# B T C: batch, time, channels

BASE = 10_000.0
half: int = 2
_hidden = 3
logger = None""",
        "not_exported = 1",
        """#| export

import math
from typing import TYPE_CHECKING
from tutorial_lib.core import norms
if TYPE_CHECKING:
    from collections.abc import Iterator

def rotate( x: Tensor ) -> Tensor:
    # the trap: which dimensions turn together?
    return x * math.pi * norms.EPS   # trailing

@torch.no_grad()
def _helper(x: Iterator[int]): return x

class Rope(nn.Module):
    '''Turns pairs.'''""",
    )
    write_module(root, "tutorial_lib/core/norms.py", "EPS = 1e-6\n")
    assert run(root) == 0
    assert (root / "tutorial_lib/core/rope.py").read_text() == (
        f"# Exported from {ROPE}. Edit the lesson, then run: make export\n"
        '''"""Rotary positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tutorial_lib.core import norms

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BASE", "half", "rotate", "Rope"]


# B T C: batch, time, channels

BASE = 10_000.0
half: int = 2
_hidden = 3
logger = None


def rotate(x: Tensor) -> Tensor:
    # the trap: which dimensions turn together?
    return x * math.pi * norms.EPS  # trailing


@torch.no_grad()
def _helper(x: Iterator[int]):
    return x


class Rope(nn.Module):
    """Turns pairs."""
'''
    )


def test_export_is_idempotent_and_passes_its_own_check(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    assert run(root, "--check") == 1
    assert (
        f"tutorial_lib/core/rope.py is missing, {ROPE} exports it: run make export."
        in capsys.readouterr().err
    )
    assert run(root) == 0
    first, stamp = snapshot(root), (root / "tutorial_lib/core/rope.py").stat().st_mtime_ns
    assert run(root, "--check") == 0
    assert run(root) == 0
    assert snapshot(root) == first
    assert (root / "tutorial_lib/core/rope.py").stat().st_mtime_ns == stamp  # not even rewritten


def test_one_notebook_can_write_two_modules_and_a_new_room(root: Path) -> None:
    masks = '#| export moe.masks\n"""Masks."""\ndef causal(): ...'
    write_lesson(root, ROPE, GOOD, masks, "#| export\nB = A")
    assert run(root) == 0
    made = snapshot(root)
    assert '__all__ = ["A", "B"]' in made["tutorial_lib/core/rope.py"]
    assert '__all__ = ["causal"]' in made["tutorial_lib/moe/masks.py"]
    assert made["tutorial_lib/moe/__init__.py"] == ""


def test_a_long_header_is_wrapped_and_still_recognised(root: Path) -> None:
    notebook = "chapters/part_2_training_a_tiny_llm/2_6_validation_and_early_stopping.ipynb"
    write_lesson(root, notebook, GOOD)
    assert run(root) == 0 and run(root, "--check") == 0
    text = snapshot(root)["tutorial_lib/core/rope.py"]
    assert text.startswith(f"# Exported from {notebook}.\n# Edit the lesson")
    assert max(map(len, text.splitlines())) <= 110


def test_overloads_are_no_double_definition(root: Path) -> None:
    one = "@overload\ndef f(x: int): ...\n"
    cell = f"from typing import overload\n{one}{one}def f(x): ..."
    write_lesson(root, ROPE, GOOD + "\n" + cell)
    assert run(root) == 0
    module = ast.parse(snapshot(root)["tutorial_lib/core/rope.py"])
    names = next(s for s in module.body if isinstance(s, ast.Assign) and s.targets[0].id == "__all__")
    assert ast.literal_eval(names.value) == ["A", "f"]


def test_quarto_options_and_strings_below_constants_are_fine(root: Path) -> None:
    write_lesson(root, ROPE, "#| label: fig\n1", FIRST + 'A = math.pi\n"""The half turn."""')
    assert run(root) == 0
    assert '"""The half turn."""' in snapshot(root)["tutorial_lib/core/rope.py"]


@pytest.mark.parametrize(
    ("cells", "parts"),
    [
        ([FIRST + "A = math.pi\nprint(A)"], (f"{ROPE}, cell 2, line 6", "print(A)", "without `#| export`")),
        ([GOOD, "#| export\n\nfor i in 'ab':\n    pass"], ("cell 3, line 3", "for i in 'ab'")),
        ([GOOD, "#| export\nx.y = 1"], ("cell 3, line 2", "only imports and definitions")),
        ([FIRST + "A = math.pi; B = 1"], ("cell 2, line 5", "two statements on one line")),
        ([GOOD, "#| export\n%pip install x"], ("cell 3, line 2", "plain Python", "mend it")),
        ([GOOD, "#| export\nA = 2"], ("`A` is defined twice", "core/rope.py", "cell 2, line 5",
                                                       "cell 3, line 2", "final version")),
        ([FIRST + "__all__ = []"], ("cell 2, line 5", "`__all__` is written for you")),
        (["#| default_exp core.rope\n#| export\nA = 1"], (ROPE, "cell 2", "core/rope.py", "docstring")),
        ([GOOD, "#| export core.masks\ndef f(): ..."], ("core/masks.py", "docstring: add it")),
        (["#| export\nA = 1"], (ROPE, "cell 2", "has no module", "#| default_exp")),
        ([FIRST, "#| default_exp core.masks\n1"], ("cell 3", "second `#| default_exp`", "keep one")),
        ([FIRST, "#| exprot\nB = 1"], ("cell 3", "`#| exprot` is unknown", "use default_exp or export")),
        ([FIRST, "B = 1\n#| export"], ("cell 3", "below code", "move it to the top")),
        (["#| default_exp core/rope\n1"], (ROPE, "cell 2", "`core/rope` is not a dotted module name")),
        (["#| default_exp core.class\n1"], ("`core.class` is not a dotted module name",)),
        (["#| default_exp tutorial_lib.core.rope\n1"], ("leave that prefix out",)),
        (["#| default_exp core\n1"], ("`core` is a folder", "choose a module in it")),
        ([FIRST + "from tutorial_lib.core.rope import A\nB = A, math.e"],
         (f"{ROPE}, cell 2, line 5", "imports tutorial_lib.core.rope", "use the name as it is")),
        ([GOOD, "#| export\ndef f():\n    from tutorial_lib.core import rope"],
         ("cell 3, line 3", "imports tutorial_lib.core.rope")),
        ([GOOD, "#| export\ndef f(): return Torch.e"],
         (ROPE, "Undefined name `Torch`", "core/rope.py", "import or define it")),
    ],
)  # fmt: skip
def test_a_mistake_in_a_lesson_is_one_sentence(root: Path, capsys, cells: list[str], parts: tuple) -> None:
    write_lesson(root, ROPE, *cells)
    refused(root, capsys, *parts)


def test_two_lessons_cannot_own_one_module(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    write_lesson(root, NORMS, '#| export core.rope\n"""Again."""\nB = 1')
    refused(root, capsys, "core/rope.py is claimed by both", ROPE, NORMS, "keep its exports in one")


def test_default_exp_alone_is_a_claim(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    write_lesson(root, NORMS, "#| default_exp core.rope\n1")
    refused(root, capsys, "claimed by both", ROPE, NORMS)


def test_an_orphan_is_named(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    write_lesson(root, NORMS, '#| default_exp core.norms\n#| export\n"""Norms."""\nEPS = 1e-6')
    assert run(root) == 0
    write_lesson(root, NORMS, "1")
    refused(root, capsys, "core/norms.py is an orphan", f"{NORMS} no longer exports it", "delete the module")
    (root / NORMS).unlink()
    refused(root, capsys, "core/norms.py is an orphan", f"{NORMS} is gone", "delete the module")


def test_a_renamed_lesson_takes_its_module_along(root: Path) -> None:
    write_lesson(root, ROPE, GOOD)
    assert run(root) == 0
    (root / ROPE).rename(root / "chapters/part_3_modernizing/3_3_rope.ipynb")
    assert run(root) == 0
    assert "3_3_rope.ipynb" in snapshot(root)["tutorial_lib/core/rope.py"].splitlines()[0]


def test_drift_says_who_is_newer(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    assert run(root) == 0
    module = root / "tutorial_lib/core/rope.py"
    module.write_text(module.read_text().replace("math.pi", "math.e"))
    os.utime(root / ROPE, (1, 1))
    assert run(root, "--check") == 1
    told = capsys.readouterr().err
    assert "core/rope.py differs" in told and ROPE in told and "edited by hand" in told
    assert "in the notebook, then run make export" in told
    os.utime(module, (0, 0))
    assert run(root, "--check") == 1
    told = capsys.readouterr().err
    assert "core/rope.py differs" in told and "line 9: run make export" in told


def test_a_hand_written_module_is_never_overwritten(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    write_module(root, "tutorial_lib/core/rope.py", "MINE = 1\n")
    refused(root, capsys, "core/rope.py is written by hand", ROPE, "another module, or delete the file")
    write_module(root, "tutorial_lib/core/rope.py", "\n")  # an empty file is nobody's work
    assert run(root) == 0


def test_a_lesson_needs_a_number_and_a_notebook_must_parse(root: Path, capsys) -> None:
    write_lesson(root, "chapters/rope.ipynb", GOOD)
    refused(root, capsys, "chapters/rope.ipynb", "name it part_lesson_title")
    (root / "chapters/rope.ipynb").write_text("{")
    refused(root, capsys, "chapters/rope.ipynb", "is not a notebook", "restore it")


def test_a_later_lesson_may_not_be_imported(root: Path, capsys) -> None:
    write_lesson(root, ROPE, GOOD)
    code = "def f():\n    from tutorial_lib.core.rope import A\n    return A"
    write_lesson(root, NORMS, f'#| default_exp core.norms\n#| export\n"""Norms."""\n{code}')
    refused(root, capsys, NORMS, "core.norms (3.1) → core.rope (3.2)", "later lesson", "plug it in")


def test_the_real_package_agrees_with_its_lessons(capsys) -> None:
    assert export.main(["--check"]) == 0, "".join(capsys.readouterr())

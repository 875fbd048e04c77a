"""The import graph is the curriculum: no arrow to a later lesson, no circle."""

from __future__ import annotations

import pytest

from tutorial_lib.nb import graph
from tutorial_lib.nb.graph import ROOT, build, levels, read_package, table, violations


def lesson(part: int, number: int, code: str) -> str:
    return f"# Exported from chapters/part_{part}_x/{part}_{number}_y.ipynb. Edit the lesson, …\n{code}\n"


def judge(**modules: str) -> list[str]:
    """The violations of a small package: `core__rope="code"` is tutorial_lib/core/rope.py."""
    paths = {f"tutorial_lib/{name.replace('__', '/', 1)}.py": code for name, code in modules.items()}
    return violations(build({"tutorial_lib/__init__.py": "", "tutorial_lib/core/__init__.py": "", **paths}))


def test_the_real_package_obeys_the_law() -> None:
    broken = violations(build(read_package(ROOT)))
    assert not broken, "\n".join(broken)


def test_the_real_package_with_an_injected_violation_fails() -> None:
    sources = read_package(ROOT)
    sources["tutorial_lib/core/early.py"] = lesson(1, 1, "from tutorial_lib.core.late import X")
    sources["tutorial_lib/core/late.py"] = lesson(99, 1, "X = 1")
    (sentence,) = violations(build(sources))
    assert "core.early (1.1) → core.late (99.1)" in sentence
    assert "chapters/part_1_x/1_1_y.ipynb" in sentence and "plug it in" in sentence


def test_earlier_and_equal_lessons_are_allowed() -> None:
    assert not judge(
        core__rope=lesson(3, 2, "import tutorial_lib.core.norms\nfrom .mlp import M\nimport torch"),
        core__norms=lesson(3, 1, ""),
        core__mlp=lesson(3, 2, ""),
    )


@pytest.mark.parametrize(
    "code",
    [
        "import tutorial_lib.core.late",
        "import tutorial_lib.core.late as late",
        "from tutorial_lib.core import late",
        "from tutorial_lib.core.late import A, B",
        "from tutorial_lib.core.late import *",
        "from .late import A",
        "from . import late",
        "from ..core.late import A",
        "def f():\n    from tutorial_lib.core.late import A",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .late import A",
        "try:\n    from .late import A\nexcept ImportError:\n    pass",
    ],
)
def test_every_way_to_import_counts(code: str) -> None:
    (sentence,) = judge(core__early=lesson(3, 1, code), core__late=lesson(3, 2, ""))
    assert "core.early (3.1) → core.late (3.2)" in sentence


def test_a_plain_module_does_not_hide_a_later_lesson() -> None:
    (sentence,) = judge(
        core__early=lesson(3, 1, "from .helper import H"),
        core__helper="from .other import O",
        core__other="from .late import L",
        core__late=lesson(5, 1, ""),
    )
    assert "core.early (3.1) → core.helper (plain) → core.other (plain) → core.late (5.1)" in sentence


def test_a_package_that_re_exports_does_not_hide_one_either() -> None:
    (sentence, _) = judge(  # and it goes up
        core__early=lesson(3, 1, "from tutorial_lib.moe import Layer"),
        moe____init__="from .layers import Layer",
        moe__layers=lesson(5, 2, "Layer = 1"),
    )
    assert "core.early (3.1) → moe (plain) → moe.layers (5.2)" in sentence


def test_one_breach_is_told_once_where_it_is() -> None:
    (sentence,) = judge(
        core__a=lesson(3, 3, "from . import b"),
        core__b=lesson(3, 2, "from . import c"),
        core__c=lesson(5, 1, ""),
    )
    assert sentence.count("→") == 1 and "core.b (3.2) → core.c (5.1)" in sentence


def test_a_circle_is_drawn_once() -> None:
    (sentence,) = judge(
        core__a="from .b import B",
        core__b="def f():\n    import tutorial_lib.core.c",
        core__c="from . import a",
    )
    assert "core.a (plain) → core.b (plain) → core.c (plain) → core.a (plain) is a circle" in sentence
    assert "tutorial_lib/core/b.py" in sentence and "below them" in sentence


def test_a_package_may_re_export_what_imports_its_siblings() -> None:
    assert not judge(
        moe____init__="from . import layers\nfrom .layers import A",
        moe__layers="from tutorial_lib.moe import router",
        moe__router="",
    )


@pytest.mark.parametrize(
    ("low", "high"),
    [("core", "data"), ("data", "interop"), ("train", "runs"), ("tools", "checks"), ("runs", "cli")],
)
def test_no_import_goes_up_a_floor_and_every_one_may_go_down(low: str, high: str) -> None:
    (sentence,) = judge(**{f"{low}__a": f"from tutorial_lib.{high} import tool", f"{high}__tool": ""})
    assert f"{low}.a (plain) → {high}.tool (plain) goes up, from {low} to {high}" in sentence
    assert f"tutorial_lib/{low}/a.py" in sentence
    assert not judge(
        **{f"{high}__a": f"def f():\n    from tutorial_lib.{low} import tool", f"{low}__tool": ""}
    )


def test_rooms_on_one_floor_do_not_import_each_other() -> None:
    (sentence,) = judge(cli__a="from tutorial_lib.tour import run", tour__run="")
    assert "from cli to tour" in sentence


def test_a_module_beside_the_folders_has_a_floor_too() -> None:
    assert not judge(kinds="from tutorial_lib.core import model", core__model="")
    (sentence,) = judge(kinds="", core__model="from tutorial_lib import kinds")
    assert "from core to kinds" in sentence


def test_a_new_room_is_asked_for_its_floor() -> None:
    (sentence,) = judge(attic__a="import torch")
    assert "tutorial_lib/attic/a.py: attic is on no floor" in sentence and "FLOORS" in sentence


def test_levels_and_table_show_the_course() -> None:
    sources = {
        "tutorial_lib/core/rope.py": lesson(3, 2, "from tutorial_lib.core.norms import N"),
        "tutorial_lib/core/norms.py": lesson(3, 1, ""),
        "tutorial_lib/tour.py": "from tutorial_lib.core.rope import R",
        "tutorial_lib/data.py": "import json",
    }
    course = build(sources)
    assert levels(course)["tutorial_lib.tour"] == (3, 2) and levels(course)["tutorial_lib.data"] == (0, 0)
    rows = [line.split() for line in table(course).splitlines()[2:]]
    assert [row[0] for row in rows] == ["data", "core.norms", "core.rope", "tour"]
    assert rows[2] == ["core.rope", "3.2", "core.norms"]
    assert rows[3] == ["tour", "plain", "≤", "3.2", "core.rope"]


def test_a_file_that_is_no_python_is_named(tmp_path, capsys) -> None:
    (tmp_path / "tutorial_lib").mkdir()
    (tmp_path / "tutorial_lib/bad.py").write_text("x = 1\ndef\n")
    assert graph.main(["--root", str(tmp_path)]) == 1
    assert "tutorial_lib/bad.py, line 2, is not Python" in capsys.readouterr().err

"""Learner code that wants to pass, or to do harm: only right numbers pass, and under strict the doors are closed.

Each forgery here has once ended in "passed", or has felled the grader.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from tutorial_lib.checks import confine, landlock, sandbox
from tutorial_lib.checks.answers import run_probe
from tutorial_lib.checks.gradings import all_exercises, find_exercise
from tutorial_lib.checks.notebook import notebook_of
from tutorial_lib.checks.plain import Foreign, pack, plain, unpack
from tutorial_lib.checks.probes import same_parameters, same_shape
from tutorial_lib.checks.sandbox import grade_notebook

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = list(all_exercises().values())
WRONG = "\n    B, T, D = x.shape\n    return x.reshape(B, n, T, D // n)"  # right in shape
strict_works = pytest.mark.skipif(bool(confine.what_stays_open()), reason=confine.what_stays_open())


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # grading forks


def graded(tmp_path: Path, source: str, strict: bool = False):
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(text) for text in ("import torch, os, sys, gc, pickle", source)]
    path = tmp_path / "1_4_x.ipynb"
    nbformat.write(nb, path)
    [result] = grade_notebook(path, [find_exercise("1.4.a")], strict=strict)
    return result


def answer(code: str) -> str:
    return "def split_heads(x, n):\n" + "".join(f"    {line}\n" for line in code.strip().splitlines()) + WRONG


INTO_THE_PIPE = """
frame = sys._getframe()
while type(frame.f_locals.get("answers")) is not int:
    frame = frame.f_back
os.write(frame.f_locals["answers"], message)
os._exit(0)
"""
FORGERIES = {
    "torch.allclose says yes": answer("torch.allclose = lambda *a, **k: True"),
    "the judges say yes": answer(
        "import tutorial_lib.checks.probes as p, tutorial_lib.checks.spec as s\n"
        "p.same_value = s.same_value = lambda *a, **k: True\np.same_shape = lambda *a: None"
    ),
    "the probes are given other judges": answer(
        "for o in gc.get_objects():\n"
        "    if type(o).__name__ == 'Probe':\n"
        "        object.__setattr__(o, 'judge', lambda yours, expected: None)"
    ),
    "the grader's own frames are changed": answer(
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    for value in list(frame.f_locals.values()):\n"
        "        if type(value).__name__ == 'Exercise':\n"
        "            object.__setattr__(value, 'probes', [])\n"
        "    frame = frame.f_back"
    ),
    "what is expected, from a frame": answer(
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    if 'expected' in frame.f_locals:\n"
        "        return frame.f_locals['expected']\n"
        "    frame = frame.f_back"
    ),
    "an object that equals everything": """
class Yes:
    __class__, shape, dtype = torch.Tensor, torch.Size([2, 3, 5, 4]), torch.float32
    def __eq__(self, other): return True
    def __getattr__(self, name): return self
    def __call__(self, *given, **named): return self
    __hash__ = object.__hash__
def split_heads(x, n):
    return Yes()
""",
    "a tensor that lies": """
class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, given=(), named=None):
        if function.__name__ in ("allclose", "all", "equal"):
            return True
        if function.__name__ == "__get__":
            return torch.Size([2, 3, 5, 4])
        return super().__torch_function__(function, types, given, named or {})
def split_heads(x, n):
    return torch.zeros(1).as_subclass(Liar)
""",
    "a pickled result in the pipe": answer(
        "from tutorial_lib.checks.grade import Result\n"
        "data = pickle.dumps(Result('1.4.a', 'split_heads', 'passed'))\n"
        "message = len(data).to_bytes(4, 'big') + data" + INTO_THE_PIPE
    ),
    "a pickle that runs code": "class Bomb:\n    def __reduce__(self):\n        return os.system, ('touch {marker}',)\n"
    + answer("data = pickle.dumps(Bomb())\nmessage = len(data).to_bytes(4, 'big') + data" + INTO_THE_PIPE),
    "a status in the pipe": answer(
        "from tutorial_lib.checks.plain import pack\n"
        "data = pack({{'status': 'passed', 'value': None}})\n"
        "message = len(data).to_bytes(8, 'little') + data" + INTO_THE_PIPE
    ),
    "brackets in brackets in the pipe": answer(
        "data = b'[' * 10**6\ndata = len(data).to_bytes(8, 'little') + data\n"
        "message = len(data).to_bytes(8, 'little') + data" + INTO_THE_PIPE
    ),
    "a message of 4 EiB": answer("message = (2**62).to_bytes(8, 'little')" + INTO_THE_PIPE),
    "an error that will not be said": "class Silent(Exception):\n    def __str__(self):\n        raise SystemExit\n"
    + answer("raise Silent"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_only_right_numbers_pass(tmp_path, name):
    marker = tmp_path / "marker"
    source = FORGERIES[name].replace("{marker}", str(marker)).replace("{{", "{").replace("}}", "}")
    result = graded(tmp_path, source)
    assert result.status in ("wrong", "crashed") and result.sentence, repr(result)
    assert "\n" not in result.sentence
    assert not marker.exists(), "learner code has run in the parent"


def test_a_message_that_never_ends_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "GRACE", 1.0)
    code = "message = (10**6).to_bytes(8, 'little') + b'x'" + INTO_THE_PIPE.replace("os._exit(0)", "")
    swallow = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    start = time.monotonic()
    assert "did not finish" in graded(tmp_path, answer(code + swallow)).sentence
    assert time.monotonic() - start < 8


def test_a_terminal_shows_what_a_learner_wrote_and_does_not_obey_it(tmp_path):
    code = (
        "error = type('\\x1b[31mE', (ValueError,), {})\nraise ValueError('\\x1b]0;title\\x07\\x1b[2J\\ud800')"
    )
    result = graded(tmp_path, answer(code))
    assert result.status == "crashed" and "title" in result.sentence
    text = repr(result) + result.details
    assert "\x1b" not in text and "\x07" not in text
    text.encode()


# ── strict: what the process reaches ──────────────────────────────────────────────────────────────────────

DOORS = {
    "the solutions": f"os.listdir({str(ROOT / 'solutions')!r})",
    "the gradings": f"open({str(ROOT / 'grading/part_1_core_transformer/1_4_multi_head_attention.py')!r})",
    "the course's code": f"open({str(ROOT / 'tutorial_lib/core/multihead.py')!r})",
    "a link to the solutions": f"os.symlink({str(ROOT / 'solutions')!r}, 'link') or os.listdir('link')",
    "the solutions by /proc": f"os.listdir('/proc/self/root' + {str(ROOT / 'solutions')!r})",
    "another learner's folder": "os.listdir(OTHER)",
    "writing there": "open(OTHER + '/mine', 'w')",
    "writing into torch": "open(__import__('torch').__file__, 'a')",
    "removing": "os.remove(OTHER + '/theirs')",
    "emptying": "os.truncate(OTHER + '/theirs', 0)",
    "a file's mode": "os.chmod(OTHER, 0o700)",
    "a file's time": "os.utime(OTHER)",
    "/dev/shm": "open('/dev/shm/llm-scratch-test', 'w')",
    "memfd": "os.memfd_create('x')",
    "fork": "os.fork() or os._exit(0)",
    "a program": "__import__('subprocess').run(['true'])",
    "exec": "os.execv('/bin/true', ['true'])",
    "a thread": "__import__('threading').Thread(target=print).start()",
    "a session of its own": "os.setsid()",
    "a signal to the parent": "os.kill(os.getppid(), 0)",
    "a signal to the group": "os.killpg(0, 0)",
    "the parent's limits": "__import__('resource').prlimit(os.getppid(), 0)",
    "the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "the parent's priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "TCP": "__import__('socket').socket()",
    "UDP": "__import__('_socket').socket(2, 2, 0)",
    "more open files": "__import__('resource').setrlimit(7, (4096, 4096))",
    "root's rights": "os.setgid(os.getgid() + 1)",
    "another root": "os.chroot('.')",
}
KNOCK = """
opened = []
for name, code in DOORS.items():
    try:
        eval(code, {{"os": os, "OTHER": OTHER}})
        opened.append(name)
    except (Exception, SystemExit):
        pass
"""


def knock(tmp_path: Path) -> str:
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs").write_text("work", encoding="utf-8")
    return (
        f"import os\nOTHER, DOORS = {str(other)!r}, {DOORS!r}\n{KNOCK.replace('{{', '{').replace('}}', '}')}"
    )


def untouched(tmp_path: Path) -> bool:
    other = tmp_path / "other"
    return os.listdir(other) == ["theirs"] and (other / "theirs").read_text(encoding="utf-8") == "work"


@strict_works
def test_under_strict_every_door_is_closed(tmp_path):
    result = graded(
        tmp_path, answer(knock(tmp_path) + "raise LookupError('opened ' + repr(opened))"), strict=True
    )
    assert result.sentence.endswith("opened []"), repr(result)
    assert untouched(tmp_path)


ALONE = """
import os, sys, torch
from pathlib import Path
from tutorial_lib.checks import confine
confine._watch = lambda places: None
confine.limit(strict=True)
confine.close_the_doors(Path(sys.argv[1]), [Path(confine.__file__).parents[1]])
open("mine", "w").write("x" * 100)
assert torch.load is not None and os.listdir() == ["mine"]
"""


@strict_works
def test_the_kernel_alone_keeps_them_closed(tmp_path):
    """Python's own watch can be fooled from within, so the walls are tried without it."""
    (tmp_path / "scratch").mkdir()
    program = ALONE + knock(tmp_path) + "print(opened)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = [sys.executable, "-c", program, str(tmp_path / "scratch")]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert untouched(tmp_path)


REACHES = {
    "imported": "from tutorial_lib.core.multihead import MultiHeadAttention as theirs\n" + answer("pass"),
    "imported inside": answer("import tutorial_lib.core.multihead"),
    "importlib": answer("import importlib\nimportlib.import_module('tutorial_' + 'lib.core.multihead')"),
}


@strict_works
@pytest.mark.parametrize("name", REACHES)
def test_under_strict_the_course_is_not_imported(tmp_path, name):
    result = graded(tmp_path, REACHES[name], strict=True)
    assert result.status == "crashed", repr(result)
    assert "build it yourself" in result.sentence or "closed to code that is graded" in result.sentence


@strict_works
def test_under_strict_no_reference_and_no_secret_lies_about(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADERS_SECRET", "s3cret")
    code = """
found, frame = [], sys._getframe(1)
while frame:
    for value in [*frame.f_locals.values(), *frame.f_globals.values(), *sys.modules.values()]:
        for one in [value, *(value if isinstance(value, (list, tuple)) else ())]:
            if callable(getattr(one, "reference", None)) or getattr(one, "__name__", "") == "split_heads":
                found.append(repr(one)) if getattr(one, "__module__", "") != "__learner__" else None
    frame = frame.f_back
raise LookupError(f"found {found} {os.environ.get('GRADERS_SECRET')}")
"""
    result = graded(tmp_path, answer(code), strict=True)
    assert result.sentence.endswith("found [] None"), repr(result)


@strict_works
@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "for i in range(10**5): open(f'f{i}', 'wb').write(bytes(2**23))",
        "while True: os.mkdir('a'), os.chdir('a')",
    ],
)
def test_under_strict_a_folder_is_not_filled(tmp_path, monkeypatch, code):
    own = tmp_path / "temporary"  # others are graded at the same time, beside
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    assert "which is too much" in graded(tmp_path, answer(code), strict=True).sentence
    assert not any(own.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=strict_works)])
def test_no_orphan_outlives_the_grader(tmp_path, strict):
    source = answer(
        "import ctypes\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass"
    )
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\nfrom tests.checks import test_strict as t\n"
        f"t.graded(pathlib.Path(sys.argv[2]), {source!r}, {strict})"
    )
    run = [sys.executable, "-c", program, str(ROOT), str(tmp_path)]
    grader = subprocess.Popen(run, env=os.environ | {"PYTHONPATH": str(ROOT)})
    children = Path(f"/proc/{grader.pid}/task/{grader.pid}/children")
    deadline = time.monotonic() + 60
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(4)  # until learner code runs
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    time.sleep(1)
    alive = [
        pid
        for pid in found
        if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()
    ]
    assert found and not alive


@strict_works
@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=[e.id for e in EXERCISES])
def test_the_solution_passes_under_strict(exercise):
    [result] = grade_notebook(notebook_of(exercise.lesson, ROOT / "solutions"), [exercise], strict=True)
    assert result.passed, repr(result)


def test_where_the_kernel_has_no_bounds_strict_says_so(monkeypatch):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert "files (this needs Landlock, in Linux 6.2 or newer)" in confine.what_stays_open()


# ── plain data ────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_data_travels_as_it_is():
    value = {
        "a": (1, 2.5, True, None),
        3: [float("inf"), "\ud800é"],
        (1, 2): torch.tensor([1.0, float("nan")]).half(),
    }
    back = unpack(pack(plain(value)))
    assert list(back) == ["a", 3, (1, 2)] and back["a"] == value["a"] and type(back["a"][2]) is bool
    assert back[3] == value[3] and torch.equal(back[1, 2].isnan(), value[1, 2].isnan())
    assert back[1, 2].dtype == torch.float16


def test_what_is_not_plain_is_made_plain_or_foreign():
    class Text(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    assert type(plain(Text("a"))) is str and type(plain(np.float32(0.5))) is float
    assert type(plain(torch.nn.Parameter(torch.ones(2)))) is torch.Tensor
    assert type(plain(torch.Size([2]))) is tuple
    for odd in (object(), {1}, 1j, torch.zeros(2, device="meta"), torch.zeros(1).expand(10**9), 10**5000):
        assert isinstance(plain(odd), Foreign) and plain(odd) != plain(odd)
    endless: list = []
    endless.append(endless)
    unpack(pack(plain(endless)))


@pytest.mark.parametrize(
    "data", [b"", b"x" * 100, (2**60).to_bytes(8, "little"), pack([1])[:-3], b"\2" + bytes(7) + b"{}"]
)
def test_bytes_that_nobody_packed_are_refused(data):
    with pytest.raises(ValueError, match="no answer of the checker's"):
        unpack(data)


@pytest.mark.parametrize("exercise", EXERCISES, ids=[e.id for e in EXERCISES])
def test_every_exercise_compares_numbers_with_the_reference(exercise):
    """A property is computed beside the learner's code, which could patch it: it must not decide alone."""

    def asks_the_reference(probe) -> bool:
        try:
            return probe.judge(run_probe(probe, exercise.reference), Foreign.named("another")) is not None
        except Exception:
            return True

    shapes = (same_shape, same_parameters)
    assert any(asks_the_reference(probe) for probe in exercise.probes if probe.judge not in shapes)

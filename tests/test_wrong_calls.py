"""Wrong command lines: each is one CodaError that says what was found, and exit code 2."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coda import border, cli
from coda.errors import CodaError
from coda.runtime import cache

SMALL = ("--dims", "M=2,D=4")
BLOCK = """import coda
@coda.block
def tiny(x: coda.Tensor["M D"], w: coda.Tensor["D"]):
    return coda.rms_norm(x, w, eps=1e-5)
"""
INDEXED = """import coda
@coda.block
def look(i: coda.Tensor["M", coda.i64], w: coda.Tensor["V D"]):
    return coda.take(w, i)
"""
TEXT = "block b(%x: [M, {}] bf16) {{\n  %0 = add %x, %x\n  return out = %0\n}}\n"
PYTHON = {
    "exits.py": "import sys\nsys.exit(0)\n",
    "exits_with_a_word.py": "raise SystemExit('enough')\n",
    "raises.py": "1 / 0\n",
    "stops.py": "raise GeneratorExit\n",
    "deep.py": "def f(): return f()\nf()\n",
    "syntax.py": "def f(:\n",
    "tabs.py": "if 1:\n\tx = 1\n        y = 2\n",
    "missing.py": "import nowhere_at_all\n",
    "circle.py": "import circle_of_two\n",
    "circle_of_two.py": "from circle import f\n",
    "mute.py": "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n",
    "empty.py": "",
    "none.py": "tiny = 1\n",
    "two.py": BLOCK + BLOCK.replace("import coda\n", "").replace("tiny", "other"),
    "only_bf16.py": BLOCK.replace(
        "    return", "    if x.dtype.name != 'bf16': raise ValueError('mine')\n    return"
    ),
    "models.py": "import sys, torch\ndef exits(): sys.exit(0)\ndef raises(): 1 / 0\n"
    "def nothing(): pass\ndef needs(x): pass\ndef three(): return 1, 2, 3\nvalue = 7\n"
    "def picky():\n"
    "    class Picky(torch.nn.Module):\n"
    "        def forward(self, x): raise ValueError('no')\n"
    "    return Picky(), (torch.zeros(2, 4),)\n"
    "def mute():\n    return torch.nn.Linear(2, 2)\n"
    "def wrong(): return torch.nn.Linear(2, 2), (torch.zeros(2, 3),)\n",
}


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """A directory of wrong files."""
    d = tmp_path_factory.mktemp("wrong")
    (d / "tiny.py").write_text(BLOCK)
    (d / "look.py").write_text(INDEXED)
    for name, text in PYTHON.items():
        (d / name).write_text(text)
    (d / "latin.py").write_bytes(b"x = '\xe9'\n")
    (d / "nul.py").write_bytes(b"x = 1\0\n")
    (d / "bin.coda").write_bytes(b"\xff\xfe\x00\x01" * 20)
    (d / "empty.coda").write_text("")
    (d / "half.coda").write_text(TEXT.format("8")[:30])
    (d / "big.coda").write_text(TEXT.format("99999999999999999999"))
    (d / "bigger.coda").write_text(TEXT.format("9" * 5000))
    (d / "wide.coda").write_text(TEXT.format("9000000000000000000"))
    (d / "op.coda").write_text(TEXT.format("8").replace("add", "frobnicate"))
    (d / "deep.coda").write_text(TEXT.format("(" * 3000 + "8" + ")" * 3000))
    (d / "directory.coda").mkdir()
    (d / "directory.py").mkdir()
    good = {"x": np.ones((2, 4), np.float32), "w": np.ones(4, np.float32)}
    arrays = {
        "object": {"x": np.array([{}], dtype=object)},
        "text": {"x": np.array(["a"])},
        "complex": {"x": np.ones((2, 4), complex)},
        "dates": {"x": np.zeros((2, 4), "datetime64[s]")},
        "fields": {"x": np.zeros((2, 4), [("a", "f4")])},
        "flat": {"x": np.ones(8, np.float32)},
        "sizes": {"x": np.ones((2, 5), np.float32)},
        "names": {"y": np.ones((2, 4), np.float32), "x": None},
    }
    for name, more in arrays.items():
        np.savez(d / f"{name}.npz", **{k: v for k, v in {**good, **more}.items() if v is not None})
    np.savez(d / "half_indices.npz", i=np.array([0.5, 1.5]), w=np.ones((4, 4), np.float32))
    np.save(d / "one.npy", good["x"])
    (d / "one.npy").rename(d / "one.npz")
    (d / "pickle.npz").write_bytes(pickle.dumps([1]))
    (d / "empty.npz").write_bytes(b"")
    (d / "text_file.npz").write_text("no zip")
    whole = (d / "flat.npz").read_bytes()
    (d / "short.npz").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(d / "other.npz", "w") as archive:
        archive.writestr("x.txt", "hello")
        archive.writestr("x.npy", b"not an array")
    (d / "good.txt").write_text("x")
    (d / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (d / "empty.safetensors").write_bytes(b"")
    (d / "bad.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    save_file({"x": torch.ones(2, 4)}, d / "lacks.safetensors")
    save_file({"x": torch.ones(2, 4, dtype=torch.complex64)}, d / "lacks_more.safetensors")
    (d / "directory.npz").mkdir()
    configs = {
        "field": '{"model_type": "llama", "hidden_size": "x"}',
        "unknown": '{"model_type": "no_such_model"}',
        "no_type": '{"hidden_size": 4}',
        "list": "[1, 2]",
        "no_json": "{",
        "nan": '{"model_type": "llama", "hidden_size": NaN}',
        "odd": '{"model_type": "llama", "hidden_size": 7, "num_attention_heads": 3}',
        "negative": '{"model_type": "llama", "intermediate_size": -4}',
        "code": '{"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}',
    }
    for name, text in configs.items():
        (d / f"model_{name}").mkdir()
        (d / f"model_{name}" / "config.json").write_text(text)
    (d / "model_empty").mkdir()
    (d / "model_bytes.json").write_bytes(b"\xff\xfe\x00")
    (d / "file").write_text("")
    (d / "open").mkdir()
    (d / "open").chmod(0o777)
    return d


T = ("{W}/tiny.py:tiny", *SMALL)
# (command line, what the message has)
TARGETS = [
    ("", "names a file or a module"),
    (":", "names a file or a module"),
    (":tiny", "names a file or a module"),
    ("nowhere.py:f", "there is no such file"),
    ("nowhere.coda", "there is no such file"),
    ("{W}/tiny.py:", "has no block|no size for dim"),
    ("{W}/tiny.py:no", "tiny.py:tiny"),
    ("{W}/tiny.py:tiny:tiny", "has no block"),
    ("{W}/two.py", "several blocks"),
    ("{W}/" + "a" * 300 + ".py:f", "there is no such file"),
    ("{W}/a\0b.py:f", "there is no such file"),
    ("{W}/directory.py:f", "there is no such model"),
    ("{W}/directory.coda", "no such file|cannot be read"),
    ("{W}/none.py:tiny", "has no block"),
    ("{W}/empty.py", "has no block"),
    ("{W}/exits.py:f", "ends the process: sys.exit"),
    ("{W}/exits_with_a_word.py:f", "enough"),
    ("{W}/raises.py:f", "ZeroDivisionError"),
    ("{W}/stops.py:f", "GeneratorExit"),
    ("{W}/deep.py:f", "RecursionError"),
    ("{W}/syntax.py:f", "SyntaxError"),
    ("{W}/tabs.py:f", "TabError"),
    ("{W}/missing.py:f", "nowhere_at_all"),
    ("{W}/circle.py:f", "ImportError"),
    ("{W}/mute.py:f", "cannot be read"),
    ("{W}/latin.py:f", "SyntaxError"),
    ("{W}/nul.py:f", "null bytes"),
    ("{W}/bin.coda", "is no text"),
    ("{W}/empty.coda", "not the text of a block"),
    ("{W}/half.coda", "not the text of a block"),
    ("{W}/op.coda", "frobnicate"),
    ("{W}/deep.coda", "not the text of a block|nested"),
    ("os.path:join", "gives no module"),
    ("os:name", "gives no module"),
    ("os:no_such_name", "there is no such model"),
    ("no_such_package:f", "there is no such model"),
    ("..relative:f", "there is no such model"),
    ("{W}/model_empty", "cannot be read"),
    ("{W}/model_bytes.json", "cannot be read"),
    ("{W}/nowhere.json", "cannot be read"),
    *(
        (f"{{W}}/model_{name}", "cannot be read|makes no model|does not run")
        for name in ("field", "unknown", "no_type", "list", "no_json", "nan", "odd", "code")
    ),
    ("{W}/model_negative", "cannot be read|makes no model|does not run"),
]
CALLS = [
    *((("explain", target), word) for target, word in TARGETS),
    (("explain", "{W}/big.coda", "--dims", "M=1"), "more elements than can be counted"),
    (("explain", "{W}/bigger.coda", "--dims", "M=1"), "5000|digits|counted|too large"),
    (("explain", "{W}/wide.coda", "--dims", "M=2"), "more elements than can be counted"),
    (("explain", "{W}/only_bf16.py:tiny", *SMALL, "--dtype", "f32"), "ValueError: mine"),
    (("explain", T[0]), "no size for dim"),
    (("explain", *T[:2], "M=2"), "no size for dim"),
    (("explain", *T[:2], "M=2,D=4,Z=1"), "there is no dim `Z`"),
    (("explain", *T[:2], "M=-1,D=4"), "cannot be read"),
    (("explain", *T[:2], "M=1.5,D=4"), "cannot be read"),
    (("explain", *T[:2], "M=1e3,D=4"), "cannot be read"),
    (("explain", *T[:2], "M=²,D=4"), "cannot be read"),
    (("explain", *T[:2], "M=٣,D=4"), "cannot be read"),
    (("explain", *T[:2], "M=,D=4"), "cannot be read"),
    (("explain", *T[:2], "=3,D=4"), "cannot be read"),
    (("explain", *T[:2], "nonsense"), "cannot be read"),
    (("explain", *T[:2], "M=2;D=4"), "cannot be read"),
    (("explain", *T[:2], "M=2,M=3,D=4"), "two sizes"),
    (("explain", *T[:2], "M=2,D=0"), "has no columns|no columns|0"),
    (("explain", *T[:2], "M=99999999999999999999,D=4"), "too large"),
    (("explain", *T[:2], "M=" + "9" * 5000 + ",D=4"), "too large"),
    (("explain", *T[:2], "M=4000000000000000000,D=4"), "more elements"),
    (("explain", *T, "--arch", "sm_80"), "does not compile for this arch"),
    (("explain", *T, "--dtype", "f7"), "no such element type"),
    (("explain", *T, "--memory", "min"), "--backward"),
    (("explain", *T, "--backward", "--memory", "most"), "most"),
    (("explain", *T, "--backward", "--wanted", "y"), "y"),
    (("explain", *T, "--backward", "--wanted", ","), "``|found"),
    (("explain", *T, "--backward", "--frozen"), "--frozen"),
    (("explain", "{W}/model_field", "--dims", "Q=1"), "a model has no dim"),
    (("run", "{W}/nowhere.py:f"), "no such file"),
    (("run", "os.path:join"), "no such file"),
    (("run", *T, "--seed", "99999999999999999999"), "no such seed"),
    (("run", *T, "--seed", "-1"), "no such seed"),
    (("run", *T[:2], "M=1000000000,D=1000000000"), "does not fit into memory"),
    (("run", *T[:2], "M=4000000000000000000,D=4"), "more elements"),
    (("run", *T, "--backend", "tpu"), "no such backend"),
    (("run", *T, "--backend", "cuda"), "needs a Hopper or Blackwell GPU"),
    (("run", *T, "--backend", "sim", "--schedule", "lazy"), "eager, late or random"),
    (("run", *T, "--backend", "sim", "--arch", "sm_80"), "arch"),
    (("run", *T, "--backend", "reference", "--report"), "belong to backend sim"),
    (("run", *T, "--dtype", ""), "no such element type"),
    (("run", *T, "--inputs", "{W}/nowhere.npz"), "no such file"),
    (("run", *T, "--inputs", "{W}/directory.npz"), "no such file"),
    (("run", *T, "--inputs", "{W}/good.txt"), "come from .safetensors or .npz"),
    (("run", *T, "--inputs", "{W}/" + "a" * 300 + ".npz"), "too long|no such file"),
    *(
        (("run", T[0], "--inputs", f"{{W}}/{name}"), "cannot be read")
        for name in (
            *("object.npz", "text.npz", "dates.npz", "fields.npz", "one.npz", "pickle.npz"),
            *("empty.npz", "text_file.npz", "short.npz", "other.npz"),
            *("short.safetensors", "empty.safetensors", "bad.safetensors"),
        )
    ),
    (("run", T[0], "--inputs", "{W}/complex.npz"), "complex128"),
    (("run", T[0], "--inputs", "{W}/names.npz"), "`x` is not in"),
    (("run", T[0], "--inputs", "{W}/lacks.safetensors"), "`w` is not in"),
    (("run", T[0], "--inputs", "{W}/flat.npz"), "declared"),
    (("run", T[0], "--inputs", "{W}/sizes.npz"), "D"),
    (("run", "{W}/look.py:look", "--inputs", "{W}/half_indices.npz"), "float64"),
    (("compile", *T, "--emit", "sass"), "no such thing to emit"),
    (("compile", *T, "--out", "/proc/nowhere"), "cannot be written"),
    (("compile", *T, "--out", "{W}/file"), "cannot be written"),
    (("compile", *T, "--out", "{W}/file/below"), "cannot be written"),
    (("compile", *T, "--out", "{W}/open"), "chmod go-w"),
    (("compile", *T, "--out", "{W}/a\0b"), "null"),
    (("compile", *T, "--arch", "hopper"), "arch"),
    (("compile", T[0]), "no size for dim"),
    (("compile", "{W}/nowhere.py:f"), "no such file"),
    (("compile", "{W}/exits.py:f"), "sys.exit"),
]
USAGE = [
    (),
    ("frobnicate",),
    ("explain",),
    ("explain", *T, "--frobnicate"),
    ("explain", *T, "more"),
    ("explain", *T, "--dims"),
    ("run", *T, "--seed", "one"),
    ("run", *T, "--seed", "1.5"),
    ("compile",),
    ("cache",),
    ("cache", "burn"),
    ("cache", "ls", "more"),
    ("doctor", "more"),
]


def called(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    out = capsys.readouterr()
    return stopped.value.code or 0, out.out, out.err


@pytest.mark.parametrize(("call", "word"), CALLS, ids=lambda c: " ".join(c)[:60] if c else "")
def test_a_wrong_call_is_one_message_and_code_2(capsys, monkeypatch, w, call, word):
    monkeypatch.syspath_prepend(str(w))
    code, out, err = called(capsys, [c.replace("{W}", str(w)) for c in call])
    assert (code, out) == (2, ""), err
    assert any(part in err for part in word.split("|")), err
    assert "Traceback" not in err
    assert "InternalError" not in err
    assert sum("Error: " in line and not line.startswith(("found", " ")) for line in
               err.splitlines()) == 1, err  # fmt: skip


@pytest.mark.parametrize("call", USAGE, ids=" ".join)
def test_wrong_usage_is_code_2(capsys, w, call):
    code, out, err = called(capsys, [c.replace("{W}", str(w)) for c in call])
    assert code == 2
    assert "Usage" in err + out or err.startswith("Error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("exits", "sys.exit"),
        ("raises", "ZeroDivisionError"),
        ("nothing", "NoneType"),
        ("needs", "TypeError"),
        ("three", "tuple"),
        ("value", "int"),
        ("picky", "ValueError: no|does not run"),
        ("mute", "an example of its arguments"),
        ("wrong", "does not run"),
    ],
)
def test_functions_that_give_no_model(capsys, monkeypatch, w, name, word):
    monkeypatch.syspath_prepend(str(w))
    code, out, err = called(capsys, ["explain", f"models:{name}"])
    assert (code, out) == (2, ""), err
    assert any(part in err for part in word.split("|")), err


@pytest.mark.parametrize("variable", ["CODA_ARCH", "CODA_BACKEND"])
def test_a_setting_that_is_none(capsys, monkeypatch, w, variable):
    monkeypatch.setenv(variable, "nonsense")
    code, out, err = called(capsys, ["run", T[0].replace("{W}", str(w)), *SMALL, "--backend", "sim"]
                            if variable == "CODA_ARCH" else
                            ["run", T[0].replace("{W}", str(w)), *SMALL])  # fmt: skip
    assert (code, out) == (2, "")
    assert variable in err


@pytest.mark.parametrize("action", ["ls", "size", "prune", "clear", "path"])
def test_a_cache_that_is_refused(capsys, monkeypatch, w, action):
    monkeypatch.setenv("CODA_CACHE_DIR", str(w / "open"))
    code, out, err = called(capsys, ["cache", action])
    assert (code, out) == (2, "")
    assert "chmod go-w" in err


def test_kernels_that_would_be_lost(capsys, monkeypatch, w):
    """Without --out they go to the cache; one that is refused keeps nothing."""
    monkeypatch.setenv("CODA_CACHE_DIR", str(w / "file"))
    code, out, err = called(capsys, ["compile", T[0].replace("{W}", str(w)), *SMALL])
    assert (code, out) == (2, "")
    assert "CODA_CACHE_DIR" in err


def test_sizes_beyond_memory_while_running(capsys, monkeypatch, w):
    def fails(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    monkeypatch.setattr(border, "random_inputs", fails)
    code, _, err = called(capsys, ["run", T[0].replace("{W}", str(w)), *SMALL])
    assert code == 2
    assert "not enough memory" in err


def test_a_file_that_is_lost_while_it_runs(capsys, monkeypatch, w):
    monkeypatch.setattr(border, "random_inputs", lambda *_: Path("/nowhere/at/all").read_text())
    code, out, err = called(capsys, ["run", T[0].replace("{W}", str(w)), *SMALL])
    assert (code, out) == (2, "")
    assert "/nowhere/at/all: No such file" in err


def test_a_fault_of_coda_asks_for_a_report(capsys, monkeypatch, w):
    monkeypatch.setattr(border, "random_inputs", lambda *_: 1 // 0)
    code, out, err = called(capsys, ["run", T[0].replace("{W}", str(w)), *SMALL])
    assert (code, out) == (1, "")
    assert "InternalError" in err
    assert "please report" in err


def test_ctrl_c(capsys, monkeypatch, w):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(border, "random_inputs", interrupted)
    code, _, err = called(capsys, ["run", T[0].replace("{W}", str(w)), *SMALL])
    assert code == 130
    assert err.split() in ([], ["interrupted"])


def test_numbers_that_json_has_not_are_null(capsys, tmp_path, w):
    path = tmp_path / "nan.npz"
    np.savez(path, x=np.full((2, 4), np.nan, np.float32), w=np.ones(4, np.float32))
    target = T[0].replace("{W}", str(w))
    code, out, _ = called(capsys, ["run", target, "--inputs", str(path), "--json"])

    def refuse(name):
        raise AssertionError(name)

    assert code == 0
    assert json.loads(out, parse_constant=refuse)["outputs"][0]["coda"] is None
    assert border.plain({"a": [1.5, float("inf"), (float("nan"),)]}) == {"a": [1.5, None, [None]]}


def test_what_is_wrong_is_a_coda_error_for_callers(w):
    with pytest.raises(CodaError, match="is no text"):
        border.load_block(f"{w}/bin.coda")
    with pytest.raises(CodaError, match=r"sys\.exit"):
        border.load_block(f"{w}/exits.py:f")
    assert cache.why_refused() == ""


def process(w, *arguments, **more):
    command = [sys.executable, "-m", "coda", *(a.replace("{W}", str(w)) for a in arguments)]
    return subprocess.run(command, text=True, check=False, stderr=subprocess.PIPE, **more)


def test_as_a_process(w):
    done = process(w, "explain", "{W}/bin.coda", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("TextError: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_output_that_nobody_reads(w):
    reading, writing = os.pipe()
    os.close(reading)
    for options in ((), ("--json",), ("--text",)):
        done = process(w, "explain", *T, *options, stdout=writing)
        assert done.returncode == 141
        assert done.stderr == ""
    os.close(writing)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(w):
    with Path("/dev/full").open("w") as full:
        done = process(w, "explain", *T, "--json", stdout=full)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams(w, closed):
    """`>&-`: what goes there is lost, and nothing else."""
    call = f"{sys.executable} -m coda explain {w}/tiny.py:tiny --dims M=2,D=4"
    command = f"exec {closed}>&-; exec {call}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert ("rows0" in done.stdout) == (closed == 2)

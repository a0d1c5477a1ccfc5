"""The command line, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import coda
from coda.cli import main

ROOT = Path(__file__).parents[1]
MLP = str(ROOT / "examples/llama_mlp.py") + ":mlp"
DIMS = "M=16,D=32,F=64"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out = capsys.readouterr()
    return stopped.value.code or 0, out.out, out.err


def test_explain(capsys):
    code, out, _ = run(capsys, "explain", MLP, "--dims", DIMS, "--arch", "sm_100a")
    assert code == 0
    for word in ("rows0", "gemm1", "gemm2", "op by op", "where each op went", "sm_100a"):
        assert word in out


def test_explain_says_what_a_norm_after_a_gemm_costs_and_why(capsys):
    file = str(ROOT / "examples/gemma2_layer.py") + ":layer"
    dims = "M=8192,D=3584,F=14336,H=16,G=8,d=256"
    _, out, _ = run(capsys, "explain", file, "--dims", dims)
    out = out.replace("\n", " ")
    assert "known only when the whole row is" in out
    _, text, _ = run(capsys, "explain", file, "--dims", dims, "--json")
    first, second = json.loads(text)["passes"]
    assert [first["kernel"], second["kernel"]] == ["rows1", "rows4"]
    assert first["modelled_us"] > first["bytes"] / 3.35e6  # at the H100's full bandwidth
    us = f"{first['modelled_us']:.1f}"
    assert f"rows1 costs 176.7 MB, {us} µs: mean (gemma2_layer.py:36 (:15))" in out


def test_explain_json(capsys):
    _, out, _ = run(capsys, "explain", MLP, "--dims", DIMS, "--json")
    found = json.loads(out)
    assert found["arch"] == "sm_90a"
    assert found["launches"] == len(found["kernels"]) == 3
    keys = {"name", "kind", "flops", "read_bytes", "write_bytes", "fused"}
    assert all(keys <= k.keys() for k in found["kernels"])
    total = sum(k["read_bytes"] + k["write_bytes"] for k in found["kernels"])
    assert found["hbm_bytes"] == total
    assert found["eager"]["launches"] > found["pointwise_fused"]["launches"] > 3
    assert found["unfused"] == []


def test_explain_backward(capsys):
    options = ("--dims", DIMS, "--backward")
    code, out, _ = run(capsys, "explain", MLP, *options)
    assert code == 0
    for word in ("kernels of the forward", "kernels of the backward", "bytes per token"):
        assert word in out
    saved = {}
    for memory in ("min", "balanced"):
        _, out, _ = run(capsys, "explain", MLP, *options, "--memory", memory, "--json")
        saved[memory] = json.loads(out)["saved_bytes_per_token"]
    assert saved["min"]["coda"] == saved["min"]["checkpointed"] + 4 < saved["balanced"]["coda"]
    assert saved["balanced"]["coda"] < saved["balanced"]["eager"]
    _, out, _ = run(capsys, "explain", MLP, *options, "--wanted", "w_down", "--text")
    assert out.count("program mlp") == 2
    assert "return dw_down=" in out


def test_options_of_training_belong_together(capsys):
    for options in (("--memory", "min"), ("--wanted", "x"), ("--backward", "--frozen")):
        code, _, err = run(capsys, "explain", MLP, "--dims", DIMS, *options)
        assert code == 2
        assert "--" in err
    code, _, err = run(capsys, "run", MLP, "--dims", DIMS, "--backward", "--wanted", "y")
    assert code == 2
    assert "found: y" in err


def test_run_backward(capsys):
    options = ("--dims", DIMS, "--backward", "--memory", "speed", "--wanted", "x,w_up")
    _, out, _ = run(capsys, "run", MLP, *options, "--backend", "reference", "--json")
    errors = json.loads(out)["outputs"]
    assert [e["output"] for e in errors] == ["dx", "dw_up"]
    assert all(0 < e["coda"] <= 1.2 * e["torch"] for e in errors)


def test_explain_text_and_a_block_in_the_text_form(capsys, tmp_path):
    path = tmp_path / "f.coda"
    path.write_text("block f(%x: [M, D] bf16) {\n  %0 = square %x\n  return out = %0\n}\n")
    code, out, _ = run(capsys, "explain", str(path), "--dims", "M=4,D=8", "--text")
    assert code == 0
    assert "rows0 = rows M × 8" in out


def test_run(capsys):
    code, out, _ = run(capsys, "run", MLP, "--dims", DIMS, "--json")
    assert code == 0
    (error,) = json.loads(out)["outputs"]
    assert error["coda"] <= error["torch"]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_run_on_given_arguments(capsys, tmp_path, kind):
    names = {"x": (4, 8), "w_norm": (8,), "w_gate": (16, 8), "w_up": (16, 8), "w_down": (8, 16)}
    tensors = {n: torch.randn(s) for n, s in names.items()}
    path = tmp_path / f"arguments.{kind}"
    if kind == "npz":
        np.savez(path, **{n: t.numpy() for n, t in tensors.items()})
    else:
        save_file(tensors, path)
    code, out, _ = run(capsys, "run", MLP, "--inputs", str(path), "--dtype", "f32", "--json")
    assert code == 0
    assert json.loads(out)["outputs"][0]["coda"] < 1e-5


def test_doctor(capsys):
    _, out, _ = run(capsys, "doctor", "--json")
    found = {f["what"]: f["found"] for f in json.loads(out)}
    assert found["coda"] == coda.__version__
    assert "reference" in found["backends"]
    assert found["CODA_ARCH"] == "sm_90a"


def test_doctor_finds_a_setting_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("CODA_ARCH", "sm_80")
    code, out, _ = run(capsys, "doctor", "--json")
    (found,) = (f for f in json.loads(out) if f["what"] == "CODA_ARCH")
    assert code == 1
    assert found["advice"] == "CODA_ARCH is one of sm_90a, sm_100a, sm_103a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "nowhere.py:f", "--dims", "M=1"), "there is no such file"),
        (("explain", MLP.replace(":mlp", ":no"), "--dims", DIMS), "has no block `no`"),
        (("explain", MLP, "--dims", "M=16"), "no size for dim"),
        (("explain", MLP, "--dims", "M=x"), "a size cannot be read"),
        (("explain", MLP, "--dims", "M=1,M=2"), "`M` has two sizes"),
        (
            ("explain", MLP, "--dims", DIMS, "--arch", "sm_80"),
            "coda does not compile for this arch",
        ),
        (("run", MLP, "--dims", DIMS, "--dtype", "f8"), "there is no such element type"),
        (("compile", MLP, "--dims", DIMS, "--emit", "sass"), "no such thing to emit"),
    ],
)
def test_mistakes_give_one_message_and_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


FILES = {
    "a mistake in the block": "def f(x: coda.Tensor['M D']): return x @ x",
    "wrong syntax": "def f(:",
    "a module that is not there": "import nowhere_at_all",
    "no block": "one = 1",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_defines_no_block_is_shown_at_its_own_line(capsys, tmp_path, name):
    path = tmp_path / "user.py"
    path.write_text("import coda\n@coda.block\n" * (name != "no block") + FILES[name] + "\n")
    if name == "a module that is not there":
        path.write_text(FILES[name] + "\n")
    code, out, err = run(capsys, "explain", f"{path}:f", "--dims", DIMS)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "typer" not in err
    assert FILES[name] in err or "has no block" in err


def test_only_the_result_goes_to_stdout(capsys, tmp_path):
    path = tmp_path / "noisy.py"
    path.write_text(
        "import coda\nprint('loading')\n@coda.block\ndef f(x: coda.Tensor['M D']): return x * 2\n"
    )
    code, out, err = run(capsys, "explain", f"{path}:f", "--dims", "M=4,D=8", "--json")
    assert code == 0
    assert json.loads(out)["launches"] == 1
    assert "loading" in err


def test_version(capsys):
    assert run(capsys, "--version") == (0, coda.__version__ + "\n", "")


def test_wrong_usage_gives_code_2(capsys):
    assert run(capsys, "explain")[0] == 2
    assert run(capsys, "explain", MLP, "--frobnicate")[0] == 2


def test_python_m_coda_is_the_same_program():
    found = subprocess.run(
        [sys.executable, "-m", "coda", "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in found.stdout for word in ("explain", "compile", "run", "doctor"))


@pytest.mark.slow
def test_compile_backward(capsys):
    options = ("--dims", "M=128,D=128,F=256", "--backward", "--wanted", "w_down", "--json")
    _, out, _ = run(capsys, "compile", MLP, *options)
    names = [k["kernel"].split() for k in json.loads(out)]
    assert [w for w, _ in names] == sorted((w for w, _ in names), reverse=True)
    assert {w for w, _ in names} == {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_compile(tmp_path, arch):
    """In a process of its own, with a directory that a second run loads from."""
    command = [sys.executable, "-m", "coda", "compile", MLP, "--dims", "M=128,D=128,F=256"]
    command += ["--arch", arch, "--json", "--out", str(tmp_path)]
    for _ in range(2):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(out)
        assert [k["kernel"] for k in found] == ["rows0", "gemm1", "gemm2"]
        for kernel in found:
            assert Path(kernel["ptx"]).read_text().count(".entry") == 1
            assert kernel["stack"] == kernel["local"] == 0
            assert kernel["registers"] > 0

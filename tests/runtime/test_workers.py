"""Kernels compiled side by side, each once."""

import os
import subprocess
import sys
import textwrap

import pytest

import coda
from coda.errors import InternalError
from coda.integrations import dynamo
from coda.runtime import compile as compiling
from coda.runtime.workers import run_all
from coda.sim.host import kept
from tests.runtime.worker_jobs import ends, fails, times_two


@pytest.fixture
def environment():
    """Workers find the module of their jobs."""
    return {"CODA_TEST_WORKER": "yes", "PYTHONPATH": os.pathsep.join(sys.path)}


def test_jobs_are_shared_out_among_processes(environment):
    found = list(run_all(times_two, range(8), environment, 2))
    assert sorted(n for n, _, _ in found) == [2 * n for n in range(8)]
    assert {value for _, value, _ in found} == {"yes"}
    processes = {process for _, _, process in found}
    assert len(processes) <= 2
    assert os.getpid() not in processes


def test_a_failure_is_told_with_its_cause(environment):
    with pytest.raises(InternalError, match="job 1 is no good"):
        list(run_all(fails, [1], environment))
    with pytest.raises(InternalError, match="ended: code 3"):
        list(run_all(ends, [1], environment))


SCRIPT = """
import coda.runtime.workers as workers
print("the user's program")
print(*workers.run_all(len, ["abc", "ab"], {}, 2))
"""


def test_a_script_needs_no_guard(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert done.stdout.count("the user's program") == 1
    assert sorted(done.stdout.split()[-2:]) == ["2", "3"]


@coda.block
def first(x: coda.Tensor["M 64"], w: coda.Tensor["96 64"]):
    return coda.silu(x @ w.T)


@coda.block
def second(x: coda.Tensor["M 64"], w: coda.Tensor["96 64"]):
    y = coda.silu(x @ w.T)
    return y, coda.rms_norm(x)


@pytest.fixture
def compiled(monkeypatch):
    """What workers are asked for; they make empty files."""
    asked = []

    def run(function, jobs, environment):
        assert function is compiling.compile_job
        assert environment["CUTE_DSL_ARCH"] == "sm_90a"
        for job in jobs:
            asked.append(job)
            yield compiling.Compiled(job.kernel, *[compiling.kernel_directory()] * 3, None)

    monkeypatch.setattr(compiling, "run_all", run)
    return asked


def test_kernels_of_several_programs_are_compiled_once(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("CODA_CACHE_DIR", str(tmp_path))
    programs = [b.lower("sm_90a", {"M": 128}) for b in (first, second)]
    count = sum(len(p.kernels) for p in programs)
    assert compiling.compile_ahead(programs) == []
    assert compiled == []
    monkeypatch.setattr(compiling, "WORTH_IT", 1)
    assert len(compiling.compile_ahead([*programs, programs[0]])) == len(compiled) == count
    for program in programs:
        for kernel in program.kernels:
            path = compiling.beside(compiling.base_of(program, kernel), ".cubin")
            path.parent.mkdir(parents=True, exist_ok=True)
            kept.write(path, b"cubin")
    assert compiling.compile_ahead(programs) == []


def test_a_model_for_a_gpu_is_compiled_ahead(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(dynamo, "choose_backend", lambda _: "cuda")
    monkeypatch.setattr(dynamo, "_refuse_devices", lambda _: None)
    monkeypatch.setattr(compiling, "compile_ahead", asked.append)
    weights = [(torch.randn(64, 64) / 8).bfloat16() for _ in range(2)]

    def model(x):
        for w in weights:
            x = torch.nn.functional.silu(x @ w) + x
        return x

    x = torch.randn(128, 64).bfloat16()
    found = torch.compile(model, backend="coda")(x)
    torch.testing.assert_close(found, model(x), rtol=0.05, atol=0.05)
    ((program,),) = asked
    assert len(program.kernels) == 2

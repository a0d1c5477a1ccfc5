"""Nothing that compiles asks a CUDA driver, on a machine that has one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coda.errors import InternalError
from coda.lowering.program.target import find_target
from coda.runtime.dry_run import without_driver
from coda.runtime.workers import run_all

DRIVER = Path(__file__).parent / "driver"
BLOCK = """
import coda

@coda.block
def mlp(x: coda.Tensor["M 64"], g: coda.Tensor["64"], w: coda.Tensor["128 64"]):
    return coda.silu(coda.rms_norm(x, g) @ w.T)
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The environment of a machine whose driver and torch log what they are asked, and the log."""
    directory = tmp_path_factory.mktemp("driver")
    library = directory / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, DRIVER / "libcuda.c"]
    subprocess.run(command, check=True)
    shutil.copy(library, directory / "libcuda.so")
    log = directory / "log"
    path = os.pathsep.join([str(DRIVER), *filter(None, sys.path)])
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(directory),
        "PYTHONPATH": path,
        "CODA_TEST_DRIVER_LOG": str(log),
        "CODA_CACHE_DIR": str(directory / "cache"),
    }

    def run(*command):
        log.write_text("")
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
        )
        return done, log.read_text().splitlines()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("import cutlass.utils as u; u.HardwareInfo().get_max_active_clusters(2)", "a call"),
        ("import torch; torch.cuda.get_device_capability()", "torch.cuda.get_device_capability"),
    ],
)
def test_questions_are_seen(machine, question, answer):
    """The log works: what compilers used to ask is in it."""
    done, asked = machine("-c", question)
    assert done.returncode
    assert answer in asked, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a"])
def test_the_command_line_and_its_workers_ask_nothing(machine, tmp_path, arch):
    path = tmp_path / "block.py"
    path.write_text(BLOCK)
    done, asked = machine("-m", "coda", "compile", f"{path}:mlp", "--arch", arch, "--dims", "M=128")
    assert done.returncode == 0, done.stderr
    assert "gemm" in done.stdout
    assert asked == []


def test_the_table_answers_where_a_driver_fails(monkeypatch):
    """In this process: the methods of the driver's class raise, and come back afterwards."""
    from cutlass.utils import HardwareInfo
    from quack.cute_dsl_utils import get_max_active_clusters

    def fails(*_):
        raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT")

    monkeypatch.setattr(HardwareInfo, "__init__", fails)
    capacity = (9, 0)
    with without_driver(find_target("sm_90a")):
        assert get_max_active_clusters(2, capacity) == 66
        assert get_max_active_clusters(1, capacity) == 132
    with without_driver(find_target("sm_100a")):
        assert get_max_active_clusters(2, (10, 0)) == 74
    with pytest.raises(RuntimeError, match="INVALID_CONTEXT"):  # and nothing is remembered
        get_max_active_clusters(2, capacity)


def test_a_failed_job_names_the_callers_line():
    with pytest.raises(InternalError) as caught:
        list(run_all(len, [3], {}))
    assert caught.value.where is not None
    assert caught.value.where.file == __file__

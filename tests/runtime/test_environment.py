"""The process's environment is read, and never written."""

import os
from contextlib import contextmanager

import pytest
import torch

import coda
from coda import sim
from coda.integrations.model_report import explain_model
from coda.runtime import settings
from coda.runtime.compile import compile_program, compiling_environment


@coda.block
def mlp(x: coda.Tensor["M 64"], g: coda.Tensor["64"], w: coda.Tensor["128 64"]):
    return coda.silu(coda.rms_norm(x, g) @ w.T)


@contextmanager
def read_only_environment():
    """An environment that raises when anything is set or deleted."""

    set_item = type(os.environ).__setitem__

    def refuse(*given):
        if given[1] != "TORCHINDUCTOR_CACHE_DIR":  # torch's compiler writes its own
            raise AssertionError(f"the environment is written: {given[1]}")
        set_item(*given)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("__setitem__", "__delitem__"):
            patch.setattr(type(os.environ), name, refuse)
        with pytest.raises(AssertionError, match="is written"):
            os.environ |= {"A": "b"}
        yield


def arguments():
    shapes = (8, 64), (64,), (128, 64)
    return [torch.randn(s, requires_grad=True) for s in shapes]


def test_calls_lowerings_and_reports_write_nothing():
    with read_only_environment():
        mlp(*arguments(), backend="reference").sum().backward()
        assert mlp.lower("sm_100a", {"M": 8}).arch == "sm_100a"
        assert mlp.explain_training("sm_90a", M=8).forward.program.kernels
        found = explain_model(f"{__name__}:small", arch="sm_100a")
        (region,) = found.report.graphs[0].regions
        assert region.forward.program.arch == "sm_100a"
        with sim.device("sm_100a"):
            from cutlass.utils import blackwell_helpers
            from quack.cute_dsl_utils import get_compile_target_capacity, get_device_capacity

            assert get_device_capacity() == get_compile_target_capacity() == (10, 0)
            assert blackwell_helpers.os.getenv("CUTE_DSL_ARCH") == "sm_100a"
        assert blackwell_helpers.os is os


@pytest.mark.slow
def test_compilers_and_the_simulator_write_nothing(tmp_path):
    with read_only_environment():
        with torch.no_grad():
            out = mlp(*(x.bfloat16() for x in arguments()), backend="sim", arch="sm_90a")
        assert out.isfinite().all()
        with settings.CACHE_DIR.as_given(str(tmp_path)):
            done = list(compile_program(mlp.lower("sm_90a", {"M": 8}), jobs=1))
        assert all(c.cubin.is_relative_to(tmp_path) and c.cubin.exists() for c in done)


def small():
    """A model and its arguments."""
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU()), [torch.empty(8, 64)]


def test_what_is_given_ends(tmp_path):
    before = settings.CACHE_DIR.get()
    with settings.CACHE_DIR.as_given(str(tmp_path)), settings.CACHE_DIR.as_given(""):
        assert settings.CACHE_DIR.get() == str(tmp_path)
        assert compiling_environment(mlp.lower("sm_90a", {"M": 8}).target)["CODA_CACHE_DIR"] == str(
            tmp_path
        )
    assert settings.CACHE_DIR.get() == before
    assert os.environ.get("CODA_CACHE_DIR", "") == before

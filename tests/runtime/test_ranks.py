"""Sharded training on two processes: FSDP2, and tensor parallelism through DTensor."""

import pytest
import torch.multiprocessing as mp

from tests.runtime.ranks import CHECKS, run_checks


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where two processes, which ran all checks, left what went wrong."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_checks, args=(directory,), nprocs=2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_two_processes(directory, check):
    failures = [p.read_text() for p in sorted(directory.glob(f"{check.__name__}.*"))]
    assert not failures, failures[0]

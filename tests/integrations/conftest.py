"""Each test compiles anew, on one thread."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends.registry import _BACKENDS, list_backends, register_backend

from coda.integrations import report
from coda.integrations.dynamo import backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing compiled, nothing reported; the backend is known though coda is not installed."""
    if "coda" not in list_backends():
        register_backend(backend, name="coda")
    assert "coda" in _BACKENDS
    monkeypatch.setenv("CODA_FALLBACK", "eager")
    torch._dynamo.reset()
    report.forget_report()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()

"""Limits numpy's BLAS to one thread while a launch runs.

A launch computes thousands of matrix products too small to split: with one thread per core they
take 10 to 100 times as long on a busy machine, because each product waits for all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()


@cache
def _controller() -> ThreadpoolController:
    """The BLAS libraries of this process; numpy has loaded its own by then."""
    import_module("numpy")
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread inside, and restore the number of threads after.

    The number is global to the process, so a lock serialises threads: otherwise the first to leave
    would lift the limit of the other, or the last would restore the limit as if it were normal.
    """
    with _lock, _controller().limit(limits=1):
        yield

"""numpy's BLAS -> one thread while a launch runs.

A launch makes thousands of products too small to share out: with a thread for each core they take
10 to 100 times as long on a machine that has other work, since each waits for all threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_lock = threading.Lock()


@cache
def _controller() -> ThreadpoolController:
    """The BLAS libraries of this process; numpy has loaded its own by then."""
    import numpy as np  # noqa: F401

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread inside, and put back what it had.

    The number is a setting of the process, so another thread that wants it waits for its turn:
    else the first to leave would end the limit of the other, or the last put back a limit.
    """
    with _lock, _controller().limit(limits=1):
        yield

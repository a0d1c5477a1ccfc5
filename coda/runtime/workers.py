"""Jobs -> their results, computed in parallel by worker processes that take one job at a time.

A worker imports coda alone. It does not import the user's main module, as a process of
`multiprocessing` does, which fails for a script without `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from coda.errors import CodaError, InternalError


def run_all(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    environment: Mapping[str, str],
    count: int = 0,
) -> Iterator[Any]:
    """Apply a function to each job, in parallel processes; yields each result when it is done.

    Args:
        function: a function of a module, found there by its name.
        jobs: arguments of the function, which can be pickled.
        environment: variables of the processes, added to those of this one.
        count: the largest number of processes; 0 for one a core.

    Raises:
        InternalError: if a job fails, or a process ends before its job is done.
    """
    own = threading.local()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = [sys.executable, "-m", "coda.runtime.workers"]
        pipe = subprocess.PIPE
        own.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env={**os.environ, **environment}
        )
        started.append(own.process)

    def run(job: Any) -> Any:
        return _ask(own.process, (function, job))

    def result(done: bool, found: Any) -> Any:
        if not done:
            raise InternalError(found)  # here, where the caller's line is known
        return found

    workers = min(count or os.cpu_count() or 1, len(jobs)) or 1
    pool = ThreadPoolExecutor(workers, "coda-compile", start)
    try:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            yield result(*done.result())
    except BaseException:
        for process in started:
            process.kill()  # their results are not needed
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for process in started:
            _end(process)


def _ask(process: subprocess.Popen[bytes], question: Any) -> tuple[bool, Any]:
    """Whether a worker did its job, with the result, or with the error's text."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(question, process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        return False, f"a compiling process ended: code {process.wait()}"


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):  # a process that was killed reads nothing
        process.stdin.close()
    process.wait()
    process.stdout.close()


def main() -> None:
    """Answer jobs until the input ends."""
    import signal
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-c ends the worker; the caller reports it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to stderr, so that stdout has answers alone
    while True:
        try:
            function, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, function(job)
        except CodaError as e:
            answer = False, str(e)
        except Exception:
            answer = False, f"a kernel does not compile\n{traceback.format_exc()}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()

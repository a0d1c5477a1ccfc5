"""Kernels compiled side by side, by processes that get a job at a time and say what became of it.

A worker begins with nothing but coda: it does not import the user's program, as a process of
`multiprocessing` does, which a script without `if __name__ == "__main__"` would not survive.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from coda.errors import InternalError


def run_all(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    environment: Mapping[str, str],
    count: int = 0,
) -> Iterator[Any]:
    """What `function` makes of each job, as it is done, in as many processes as there are cores.

    Args:
        function: of a module, found there by its name.
        jobs: what can be pickled.
        environment: variables that the processes have beside this one's.
        count: of processes, at most.

    Raises:
        InternalError: where a job fails, or a process ends before it is done.
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

    workers = min(count or os.cpu_count() or 1, len(jobs)) or 1
    pool = ThreadPoolExecutor(workers, "coda-compile", start)
    try:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for process in started:
            _end(process)


def _ask(process: subprocess.Popen[bytes], question: Any) -> Any:
    """The answer of a worker."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(question, process.stdin)
        process.stdin.flush()
        done, found = pickle.load(process.stdout)
    except (EOFError, OSError) as e:
        raise InternalError(f"a compiling process ended: code {process.wait()}") from e
    if not done:
        raise InternalError(f"a kernel does not compile\n{found}")
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait()
    process.stdout.close()


def main() -> None:
    """Answer until nobody asks."""
    import traceback

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    while True:
        try:
            function, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, function(job)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()

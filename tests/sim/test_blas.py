"""BLAS has one thread while a launch runs, and what it had before afterwards."""

import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from coda.sim import Deadlock, machine
from coda.sim.units import blas
from tests.sim.kernels import kernel, launch


def set_threads(libraries, number):
    """Set the threads of BLAS, in a thread that ends: threadpoolctl heeds the first."""
    setter = threading.Thread(
        target=lambda: [library.set_num_threads(number) for library in libraries]
    )
    setter.start()
    setter.join()


@pytest.fixture
def several():
    """numpy's BLAS with three threads; the numbers of its libraries now."""
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    assert libraries, "numpy without a BLAS that threadpoolctl knows"
    before = libraries[0].num_threads
    set_threads(libraries, 3)
    yield lambda: {library.num_threads for library in libraries}
    set_threads(libraries, before)


def test_a_launch_runs_with_one_thread(several, monkeypatch):
    seen = []
    original = machine.Machine.run

    def run(self):
        seen.append(several())
        return original(self)

    monkeypatch.setattr(machine.Machine, "run", run)
    before = several()
    launch(kernel("st.global.b32 [%rd0], 7;\nret;"), np.zeros(4, np.uint32))
    assert seen == [{1}]
    assert several() == before == {3}


def test_a_launch_that_fails_puts_it_back(several):
    text = kernel("mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0;\n@%p1 bar.sync 0, 64;\nret;")
    with pytest.raises(Deadlock):
        launch(text, np.zeros(4, np.uint32))
    assert several() == {3}


def test_launches_of_two_threads_take_turns(several):
    """Neither ends the limit of the other, and the number from before comes back."""
    seen, come = [], threading.Event()

    def other():
        come.set()
        with blas.one_blas_thread():
            seen.append(several())

    thread = threading.Thread(target=other)
    with blas.one_blas_thread():
        thread.start()
        assert come.wait(10)
        thread.join(0.05)
        assert not seen
    thread.join(10)
    assert seen == [{1}]
    assert several() == {3}

"""Blocks traced by several threads at once keep their own source lines."""

import threading

from coda.errors import Where
from coda.ir.dims import Dim
from coda.ir.graph import Input, Map
from coda.ir.node import origin
from coda.ir.types import f32


def test_source_lines_of_two_threads_do_not_mix():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with origin(Where("other.py", 7)):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    try:
        x = Input("x of this thread", (Dim.of("M"),), f32)
        node = Map("exp", (x,))
    finally:
        leave.set()
        thread.join()
    assert node.where is None or node.where.file != "other.py"

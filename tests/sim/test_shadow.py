"""The shadow of a memory against a plain statement of it: every reader of every word in a list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coda.sim.checks.shadow import Events, Shadow
from coda.sim.ptx.parse import Instruction

WARPS, WORDS = 5, 16


def instruction(line):
    return Instruction("ld.shared.u32", [], None, False, line, "")


@st.composite
def steps(draw):
    """Reads, writes and messages between warps; a message carries what its sender knows."""
    out = []
    for _ in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from(["read", "read", "write", "message"]))
        if kind == "message":
            out.append((kind, draw(st.permutations(range(WARPS)))[:2]))
            continue
        words = draw(st.sampled_from([1, 2]))
        lanes = st.tuples(st.integers(0, WARPS - 1), st.integers(0, WORDS // words - 1))
        out.append((kind, (words, draw(st.lists(lanes, min_size=1, max_size=8)))))
    return out


@settings(max_examples=200)
@given(steps())
def test_who_still_reads_what_is_written(program):
    shadow = Shadow(Events(), WORDS)
    seen = np.eye(WARPS, dtype=np.int32)  # a warp's component is its own number
    model = [[] for _ in range(WORDS)]
    for line, (kind, what) in enumerate(program, 1):
        if kind == "message":
            sender, receiver = what
            np.maximum(seen[receiver], seen[sender], out=seen[receiver])
            seen[sender, sender] += 1
            continue
        words, lanes = what
        r, at = (np.array(x) for x in zip(*lanes, strict=True))
        touched = [(w, a * words + i) for w, a in lanes for i in range(words)]
        if kind == "read":
            ins, clocks = instruction(line), np.diag(seen).tolist()
            events = [shadow.events.number(w, w, c, 0, ins) for w, c in enumerate(clocks)]
            shadow.read(at, words, r, np.array(events, np.int32), seen)
            for warp, word in touched:
                model[word].append((warp, int(seen[warp, warp])))
            continue
        readers = shadow.readers.reshape(-1, words)
        found = shadow.read_before(readers[at], r, seen)
        late = {(w, x) for w, x in touched for reader, clock in model[x] if seen[w, reader] < clock}
        assert (found is not None) == bool(late)
        for warp in range(WARPS):
            mine = sorted({x for w, x in touched if w == warp})
            still = shadow.still_reading(shadow.readers[mine], seen[warp])
            assert (still is not None) == any(w == warp for w, _ in late)
        readers[at] = 0
        for _, word in touched:
            model[word] = []

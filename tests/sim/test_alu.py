"""Every arithmetic opcode against its scalar statement, and the table against ptxas."""

import random
import re
import subprocess
from collections import defaultdict

import numpy as np
import pytest

from coda.runtime.sass import tool
from coda.sim.alu.opcodes import define
from coda.sim.alu.table import TABLE, lookup
from tests.sim.scalar import reference
from tests.sim.scalar.numbers import NAN, decode
from tests.sim.scalar.samples import array, bits_of, samples, width_of

FAMILIES = defaultdict(list)
for _op in TABLE:
    FAMILIES[_op.split(".")[0]].append(_op)


def agrees(want, got, kind):
    """Equal bits, a result within bounds, or a NaN where no NaN is canonical."""
    if callable(want):
        return want(got)
    if kind == "f32x2":
        return all(agrees(want >> s & 0xFFFFFFFF, got >> s & 0xFFFFFFFF, "f32") for s in (0, 32))
    if kind in ("f32", "f64") and decode(want, kind) is NAN:
        return decode(got, kind) is NAN
    return want == got


def mistakes(op, entry, seed):
    """The lanes on which an opcode and its scalar statement differ."""
    rng = random.Random(seed)
    run = reference(op)
    columns = samples(op, entry, rng, 64 if op.startswith("set") else 128)
    results = entry.result.split("|")
    with np.errstate(all="ignore"):
        out = entry.run(*[array(c, k) for c, k in zip(columns, entry.sources, strict=True)])
    outs = out if len(results) == 2 else (out,)
    got = list(zip(*[bits_of(o, k) for o, k in zip(outs, results, strict=True)], strict=True))
    wrong = []
    for lane, operands in enumerate(zip(*columns, strict=True)):
        want = run(*operands)
        wants = want if isinstance(want, tuple) else (want,)
        if not all(agrees(w, g, k) for w, g, k in zip(wants, got[lane], results, strict=True)):
            shown = [hex(w) if isinstance(w, int) else w for w in wants]
            wrong.append(
                f"{op} {[hex(x) for x in operands]}: {list(map(hex, got[lane]))}, want {shown}"
            )
    return wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_every_opcode_does_what_its_scalar_statement_says(family):
    for op in FAMILIES[family]:
        wrong = mistakes(op, TABLE[op], seed=op)
        assert not wrong, "\n".join(wrong[:5])


def outcome(entry, operands):
    """The results of a call as arrays of bits, with one NaN for all of f32 and f64."""
    with np.errstate(all="ignore"):
        out = entry.run(*operands)
    seen = []
    for o, kind in zip(
        out if isinstance(out, tuple) else (out,), entry.result.split("|"), strict=True
    ):
        parts = o.view(np.float32) if kind == "f32x2" else o
        bits = np.where(parts != parts, np.nan, parts) if kind[0] == "f" else parts
        seen.append((o.dtype, o.shape, bits.tobytes()))
    return seen


def one_of_each_kind():
    """An opcode for each piece of code and types of operands."""
    kinds = {}
    for op, entry in TABLE.items():
        code = getattr(entry.run, "__code__", entry.run)
        kinds.setdefault((op.split(".")[0], code, entry.sources, entry.result), op)
    return list(kinds.values())


def test_immediates_and_values_of_whole_warps_count_as_arrays():
    ops = one_of_each_kind()
    assert len(ops) > 500
    for op in ops:
        entry = TABLE[op]
        columns = samples(op, entry, random.Random(op), 64)
        arrays = [array(c, k) for c, k in zip(columns, entry.sources, strict=True)]
        kept = [x.copy() for x in arrays]
        for k in range(len(arrays) if len(arrays) > 1 else 0):
            for small in (arrays[k][0, 3], arrays[k][:, 5:6].copy()):
                whole = np.broadcast_to(small, arrays[k].shape).copy()
                got = outcome(entry, [*arrays[:k], small, *arrays[k + 1 :]])
                assert got == outcome(entry, [*arrays[:k], whole, *arrays[k + 1 :]]), (op, k)
        for before, after in zip(kept, arrays, strict=True):
            assert before.tobytes() == after.tobytes(), f"{op} writes to a source"


def words(seed):
    return np.random.default_rng(seed).integers(0, 2**32, (2, 32), dtype=np.uint32)


def test_every_permutation_by_an_immediate():
    a, b = words(0), words(1)
    statement = reference("prmt.b32")
    for selector in [*range(0, 0x10000, 7), 0x3210, 0x5410, 0x7632, 0x1032, 0x7654, 0x7531]:
        got = TABLE["prmt.b32"].run(a, b, np.uint32(selector))
        for lane in (0, 40):
            x, y, z = (int(v.flat[lane]) for v in (a, b, got))
            assert z == statement(x, y, selector), hex(selector)


def test_every_function_of_three_bits():
    a, b, c = np.uint32(0xF0), np.uint32(0xCC), np.uint32(0xAA)
    for code in range(256):
        got = TABLE["lop3.b32"].run(a, b, c, np.uint32(code))
        assert int(got) & 255 == code, "the table is what the function makes of F0, CC and AA"
        assert reference("lop3.b32")(0xF0, 0xCC, 0xAA, code) & 255 == code


def test_what_is_not_in_the_table_has_no_entry():
    assert lookup("max.relu.f32", 2) is None
    assert lookup("add.s32", 3) is None
    assert lookup("max.f32", 2) is TABLE["max.f32"]
    assert lookup("max.f32", 3) is TABLE["max.f32:3"]
    assert lookup("setp.eq.and.s32", 3, pair=True) is TABLE["setp.eq.and.s32|"]
    assert lookup("addc.cc.u32", 2) is TABLE["addc.cc.u32"], "the carry is no written operand"
    with pytest.raises(ValueError, match="declared twice"):
        define(dict(TABLE), "add.f32", np.add, "T", "T", "T")


REGISTERS = {1: "p", 8: "b", 16: "h", 32: "r", 64: "d"}


def register(kind, number):
    floats = {"f32": "f", "f64": "e"}
    return f"%{floats.get(kind) or REGISTERS[width_of(kind)]}{number}"


def statement(op, entry):
    """A line of PTX that uses an opcode with registers of the types that its entry names."""
    name = re.sub(r"(:\d)?\|?$", "", op)
    results = [k for k in entry.result.split("|") if k != "cc"]
    sources = [register(k, n) for n, k in enumerate(entry.sources) if k != "cc"]
    if name.startswith("lop3"):
        sources[3] = "0x1b"
    if name.startswith("cvt.rs") and "x4" in name:
        sources = ["{" + ", ".join(sources[:4]) + "}", sources[4]]
    written = "|".join(register(k, n) for n, k in enumerate(results))
    return f"{name} {written}, {', '.join(sources)};"


def refused(ops, arch):
    """The opcodes of which ptxas refuses the statement."""
    head = [".version 9.2", f".target {arch}", ".address_size 64", ".visible .entry k() {"]
    head += [".reg .pred %p<9>; .reg .b8 %b<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<9>;"]
    head += [".reg .f32 %f<9>; .reg .f64 %e<9>;"]
    text = "\n".join([*head, *(statement(op, TABLE[op]) for op in ops), "ret;", "}"])
    command = [tool("ptxas"), f"-arch={arch}", "-O0", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    lines = [int(x) for x in re.findall(r"line (\d+); *error", done.stderr)]
    assert lines or done.returncode == 0, done.stderr
    return [ops[line - 1 - len(head)] for line in lines]


def test_ptxas_takes_every_opcode_with_the_operands_of_its_entry():
    wrong = refused(list(TABLE), "sm_100a")
    assert [statement(op, TABLE[op]) for op in wrong] == []

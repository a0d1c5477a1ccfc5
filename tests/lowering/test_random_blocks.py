"""Random well-typed blocks: the Program, run kernel by kernel in float64, equals the block."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coda
from coda.frontend.tensor import Tensor
from coda.ir.dims import Dim
from coda.ir.evaluate import evaluate
from coda.ir.graph import Graph, Input
from coda.ir.types import f64
from coda.lowering.compiler import lower
from coda.runtime.reference import run_reference

SIZES = {"M": 5, "D": 64, "E": 96}
HEAD = 32
M, D, E = Dim.of("M"), Dim.of("D"), Dim.of("E")
UNARY = (coda.tanh, coda.sigmoid, coda.square, abs, coda.relu, coda.silu, lambda x: coda.exp(-x))
BINARY = (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, coda.maximum)
ROW = (
    lambda x: coda.mean(x, keepdims=True),
    lambda x: coda.sum(x * x, keepdims=True),
    lambda x: coda.rsqrt(coda.mean(x * x, keepdims=True) + 1.0),
    lambda x: coda.logsumexp(x, keepdims=True),
    lambda x: coda.max(x, keepdims=True),
)
WHOLE = (
    *ROW,
    lambda x: coda.mean(coda.square(x - coda.mean(x, keepdims=True)), keepdims=True),
    lambda x: coda.min(coda.tanh(x), keepdims=True) / x.shape[0],
)
LAYERS = (
    lambda x: coda.rms_norm(x, eps=0.5),
    lambda x: coda.layer_norm(x, eps=0.5),
    coda.softmax,
    coda.log_softmax,
)


class Author:
    """Writes a block, one random operation after another."""

    def __init__(self, draw, dtype=f64):
        self.draw, self.dtype = draw, dtype
        self.inputs = []
        self.pool = [self.input("x", (M, D)), self.input("y", (M, D))]

    def input(self, name, shape):
        node = Input(f"{name}{len(self.inputs)}", shape, self.dtype)
        self.inputs.append(node)
        return Tensor(node)

    def pick(self, *shapes):
        fits = [t for t in self.pool if t.shape in shapes] or self.pool[:1]
        return self.draw(st.sampled_from(fits))

    def step(self):
        kind = self.draw(st.sampled_from(self.KINDS))
        x = self.pick((M, D), (M, E))
        self.pool.append(kind(self, x))

    def unary(self, x):
        return self.draw(st.sampled_from(UNARY))(x)

    def binary(self, x):
        return self.draw(st.sampled_from(BINARY))(x, self.pick(x.shape, (M, Dim.of(1))))

    def row(self, x):
        return self.draw(st.sampled_from(ROW))(x)

    def layer(self, x):
        return self.draw(st.sampled_from(LAYERS))(x)

    def gain(self, x):
        return x * self.input("w", x.shape[-1:])

    def bias(self, x):
        return x + self.input("b", x.shape[-1:])

    def contract(self, x):
        out = self.draw(st.sampled_from((D, E)))
        return x @ self.input("w", (out, x.shape[-1])).T

    def gated(self, x):
        out = self.draw(st.sampled_from((D, E)))
        gate, up = (x @ self.input("w", (out, x.shape[-1])).T for _ in range(2))
        return coda.swiglu(gate, up)

    def rope(self, x):
        heads = x.reshape(M, x.shape[-1] // HEAD, HEAD)
        interleaved = self.draw(st.booleans())
        cos, sin = (self.input(n, (M, Dim.of(HEAD // 2))) for n in ("cos", "sin"))
        return coda.rope(heads, cos, sin, interleaved=interleaved).reshape(*x.shape)

    def head_norm(self, x):
        heads = x.reshape(M, x.shape[-1] // HEAD, HEAD)
        return coda.rms_norm(heads, self.input("w", (Dim.of(HEAD),)), eps=0.5).reshape(*x.shape)

    def halves(self, x):
        a, b = coda.split(x, 2)
        return coda.concat([b, coda.tanh(a)])

    def scalar(self, x):
        return x * self.input("s", (Dim.of(1),))

    def everything(self, x):
        whole = self.draw(st.sampled_from(WHOLE))(x.reshape(M * x.shape[-1]))
        return x * coda.sigmoid(whole)

    def rows(self, x):
        return x * coda.sigmoid(self.draw(st.sampled_from(WHOLE))(coda.sum(x, axis=-1)))

    KINDS = (
        *(unary, binary, row, layer, gain, bias, contract, gated, rope, head_norm, halves),
        *(scalar, everything, rows),
    )


@st.composite
def blocks(draw, steps=12, dtype=f64):
    author = Author(draw, dtype)
    for _ in range(draw(st.integers(1, steps))):
        author.step()
    count = draw(st.integers(1, 2))
    outputs = [("out0", author.pool[-1].node)]
    if count == 2:
        outputs.append(("out1", author.pick((M, D), (M, E)).node))
    return Graph("random", tuple(author.inputs), tuple(outputs))


def values(graph, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in graph.inputs:
        shape = [d.size(sizes) for d in node.shape]
        found.append(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2)
    return found


def check(graph, frozen):
    used = {s for i in graph.inputs for d in i.shape for s in d.symbols}
    sizes = {s: n for s, n in SIZES.items() if s in used}
    program = lower(graph, sizes, "sm_90a", frozen=frozen)
    assert "M" not in program.fixed
    for rows in (SIZES["M"], 1, 9):
        now = {**sizes, "M": rows}
        inputs = values(graph, now)
        expected = evaluate(graph.roots, dict(zip(graph.inputs, inputs, strict=True)), now)
        found = run_reference(program, inputs, exact=True, sizes=now)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


SETTINGS = settings(suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@settings(SETTINGS, max_examples=150)
@given(blocks(), st.booleans())
def test_a_program_means_what_its_block_means(graph, frozen):
    check(graph, frozen)


def test_a_statistic_stays_where_a_kernel_refuses_what_reads_it_in_pairs():
    x = Tensor(Input("x", (M, D), f64))
    cos, sin = (Input(n, (M, Dim.of(HEAD // 2)), f64) for n in ("cos", "sin"))
    shifted = x + coda.logsumexp(x, keepdims=True)
    heads = shifted.reshape(M, x.shape[-1] // HEAD, HEAD)
    turned = coda.rope(heads, Tensor(cos), Tensor(sin)).reshape(*x.shape)
    check(Graph("turned", (x.node, cos, sin), (("out", coda.tanh(turned).node),)), False)


@pytest.mark.slow
@settings(SETTINGS, max_examples=1500)
@given(blocks(), st.booleans())
def test_many_programs_mean_what_their_blocks_mean(graph, frozen):
    check(graph, frozen)

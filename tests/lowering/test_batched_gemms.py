"""Batched contractions as GEMMs: how operands are read, what is refused, and what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coda
from coda.ir.dims import ONE, Dim, product
from coda.ir.evaluate import evaluate
from coda.ir.graph import Contract, Input, Permute, Reshape, Slice
from coda.ir.types import bf16, f32
from coda.kernels.gemm.batch_operands import columns_by_matrix, laid_out
from coda.kernels.gemm.batches import Batches, BatchStrides, batches, why_not
from coda.kernels.gemm.kind import GEMM
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.program.cost import hbm_bytes, tensor_flops
from coda.lowering.program.text import program_source, show_program
from coda.measure import random_inputs
from coda.runtime.reference import run_reference
from tests.lowering.test_random_blocks import SETTINGS

T = coda.Tensor
B, S, D, H = (Dim.of(n) for n in "BSDH")
KNOWN = {"S": 24, "D": 16, "H": 3}
SIZES = {**KNOWN, "B": 2}


def sized(shape):
    return [d.size(SIZES) for d in shape]


def tensor(node):
    """A node's value, with the strides that it has as a view of its argument."""
    match node:
        case Permute(arg=arg, order=order):
            return tensor(arg).permute(order)
        case Reshape(arg=arg):
            return tensor(arg).reshape(sized(node.shape))
        case Slice(arg=arg, axis=axis, start=start, size=size):
            return tensor(arg).narrow(axis, start.size(SIZES), size.size(SIZES))
    shape = sized(node.shape)
    return torch.arange(product(node.shape).size(SIZES), dtype=torch.float32).reshape(shape)


def seen(x, inner, step):
    """The matrices [L, R, C] that a kernel reads of an operand that it is passed, by `step`."""
    count, rows, columns = x.shape
    own, r, c = x.stride()
    every = rows * r if c == 1 else columns * c
    strides = {
        BatchStrides.PLAIN: (own * inner, own),
        BatchStrides.NESTED: (every, own),
        BatchStrides.SHARED: (0, 0),
        BatchStrides.SHARED_INSIDE: (every, 0),
        BatchStrides.SHARED_OUTSIDE: (0, every),
    }[step]
    whole = x.as_strided((count // inner, inner, rows, columns), (*strides, r, c))
    return whole.reshape(x.shape)


TOKENS = Input("t", (B, S, 3 * H * D), bf16)
HEADS = Reshape(Slice(TOKENS, -1, H * D, H * D, 1), (B, S, H, D))
OPERANDS = {
    "heads": (Permute(HEADS, (0, 2, 1, 3)), BatchStrides.NESTED),
    "heads, transposed": (Permute(HEADS, (0, 2, 3, 1)), BatchStrides.NESTED),
    "contiguous": (Input("x", (B, H, S, D), bf16), BatchStrides.PLAIN),
    "transposed": (Permute(Input("x", (B, H, D, S), bf16), (0, 1, 3, 2)), BatchStrides.PLAIN),
    "heads first": (Permute(Input("x", (H, B, S, D), bf16), (1, 0, 2, 3)), None),
    "one for all": (Input("x", (S, D), bf16), BatchStrides.SHARED),
    "one for each batch": (Input("x", (B, ONE, S, D), bf16), BatchStrides.SHARED_INSIDE),
    "one for each head": (Input("x", (H, S, D), bf16), BatchStrides.SHARED_OUTSIDE),
    "heads inside": (Permute(Input("x", (B, S, D, H), bf16), (0, 3, 1, 2)), None),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_how_an_operand_is_read(name):
    operand, step = OPERANDS[name]
    other = Permute(HEADS, (0, 2, 1, 3))
    columns = operand.shape[-1] == S
    other = Permute(HEADS, (0, 2, 3, 1)) if columns else other
    node = Contract(other, operand, bf16)
    if step is None:
        assert "since an operand" in why_not(node, KNOWN) or "neither" in why_not(node, KNOWN)
        return
    assert batches(node, KNOWN) == Batches(3, BatchStrides.NESTED, step)
    assert why_not(node, KNOWN) == ""
    x = tensor(operand)
    found = laid_out(x, (2, 3), 3, step)
    torch.testing.assert_close(
        seen(found, 3, step), x.expand(2, 3, *x.shape[-2:]).reshape(found.shape)
    )
    assert found.data_ptr() == x.data_ptr()


@st.composite
def strided(draw):
    """An operand [2, 3, R, C], with any strides, sizes of 1 and misaligned addresses."""
    shape = [draw(st.sampled_from((1, n))) for n in (2, 3)]
    shape += [draw(st.sampled_from((1, 5, 8))), draw(st.sampled_from((1, 8, 13)))]
    order = draw(st.permutations(range(4)))
    wide = [shape[i] for i in order]
    wide[-1] += draw(st.sampled_from((0, 3, 8)))
    first = draw(st.sampled_from((0, 1, 8)))
    count = torch.Size(wide).numel()
    x = torch.arange(count + first, dtype=torch.float32)[first:].reshape(wide)
    x = x.narrow(-1, 0, shape[order[-1]])
    return x.permute([order.index(i) for i in range(4)])


@settings(SETTINGS, max_examples=150)
@given(strided(), st.sampled_from(BatchStrides))
def test_an_operand_of_any_strides_is_read_or_copied(x, step):
    if step in (BatchStrides.SHARED, BatchStrides.SHARED_OUTSIDE):
        x = x[:1]
    if step in (BatchStrides.SHARED, BatchStrides.SHARED_INSIDE):
        x = x[:, :1]
    found = laid_out(x, (2, 3), 3, step)
    assert all(
        s * 4 % 16 == 0
        for s, n in zip(found.stride(), found.shape, strict=True)
        if s != 1 and n > 1
    )
    torch.testing.assert_close(
        seen(found, 3, step), x.expand(2, 3, *x.shape[-2:]).reshape(found.shape)
    )


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_numbers_of_rows_by_matrix(rows):
    x = torch.arange(3.0 * rows)
    found = columns_by_matrix(x, 3)
    torch.testing.assert_close(found, x.reshape(3, rows))
    assert found.stride(0) % 4 == 0


REFUSED = {
    "a product of batches of f32 is one operation of torch": (f32, f32, ("S", "D")),
    "of bf16 and f32": (bf16, f32, ("S", "D")),
    "the columns of a batched contraction are known": (bf16, bf16, ("S", "E")),
    "not a multiple of 8": (bf16, bf16, ("S", 13)),
    "without columns": (bf16, bf16, ("S", 0)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_left_to_torch(why):
    left, right, dims = REFUSED[why]
    rows, columns = map(Dim.of, dims)
    x, w = Input("x", (B, rows, columns), left), Input("w", (B, D, columns), right)
    assert why in why_not(Contract(x, w, bf16), KNOWN)


def test_a_number_of_heads_that_only_a_call_tells():
    q = Permute(Input("q", (B, S, H, D), bf16), (0, 2, 1, 3))
    node = Contract(q, q, bf16)
    assert "the number `H`" in why_not(node, {"S": 24, "D": 16})
    assert not why_not(node, KNOWN)


@coda.block
def scores(q: T["B S 4 16"], k: T["B S 4 16"], c: T["B 4 S S"], r: T["B 4 S 1"]):
    return coda.tanh(coda.einsum("b i h d, b j h d -> b h i j", q, k) * r) + c


def test_one_kernel_with_its_epilogue():
    sizes = {"B": 2, "S": 72}
    program = scores.lower("sm_90a", sizes)
    (kernel,) = program.kernels
    assert kernel.kind is GEMM
    assert kernel.mainloop.points(sizes) == (2 * 4 * 72, 72)
    assert tensor_flops(program, kernel) == 2 * (2 * 4) * 72 * 72 * 16
    heads, square, rows = 2 * 72 * 4 * 16, 2 * 4 * 72 * 72, 2 * 4 * 72
    assert hbm_bytes(program) == 2 * (2 * heads + 2 * square + rows)
    assert "8 · 72×72×16" in str(program)
    assert "inner=4, a='NESTED', b='NESTED'," in program_source(program)


def test_waves_and_partials_count_the_batch():
    @coda.block
    def f(x: T["L M 64"], w: T["L 64 64"]):
        return coda.softmax(x @ w)

    few, many = (f.lower("sm_90a", {"L": n, "M": 128}) for n in (1, 1024))
    assert few.kernels[0].kind is many.kernels[0].kind is GEMM
    rows = [k.kernels[0].kind.partials(k, k.kernels[0], k.sizes).of_rows for k in (few, many)]
    assert rows[1] >= 1024
    assert few.kernels[0].config.tile_m <= many.kernels[0].config.tile_m


def test_explain_says_what_a_gemm_cannot_read():
    @coda.block
    def f(x: T["B M 13"], w: T["B 8 13"]):
        return x @ w.mT

    (kernel,) = f.lower("sm_90a", {"B": 2, "M": 8}).kernels
    assert kernel.kind is TORCH
    text = " ".join(str(f.explain("sm_90a", B=2, M=8)).split())
    assert "13 elements apart, not a multiple of 8" in text


def test_derivatives_are_gemms():
    forward, backward = scores.lower_training("sm_90a", {"B": 2, "S": 72})
    assert [k.kind for k in forward.kernels] == [GEMM]
    kinds = [k.kind for k in backward.kernels]
    assert kinds.count(GEMM) == 2
    assert TORCH not in kinds  # dq and dk are stored with heads inside a token


@coda.block
def into_tokens(p: T["B 3 S S"], v: T["B S 3 24"], w: T["D 72"]):
    y = coda.einsum("b h i j, b j h d -> b i h d", p, v) * 0.5
    return y.reshape("B S 3 24 -> B S 72") @ w.T


def test_a_permutation_between_two_contractions_is_a_stride():
    sizes = {"B": 2, "S": 72, "D": 40}
    program = into_tokens.lower("sm_90a", sizes)
    first, second = program.kernels
    assert first.kind is second.kind is GEMM
    (store,) = first.body.epilogue.stores
    assert store.rows.order == (0, 2, 1)
    inputs = [x.double() for x in random_inputs(into_tokens.graph, sizes)]
    expected = evaluate(
        into_tokens.graph.roots, dict(zip(program.graph.inputs, inputs, strict=True)), sizes
    )
    torch.testing.assert_close(run_reference(program, inputs, exact=True)[0], expected[0])


def test_rows_that_are_read_in_both_orders_are_stored_in_both():
    @coda.block
    def f(p: T["B 3 S S"], v: T["B S 3 24"]):
        y = coda.einsum("b h i j, b j h d -> b h i d", p, v) * 0.5
        return y, coda.einsum("b h i d -> b i h d", coda.tanh(y))

    (kernel,) = f.lower("sm_90a", {"B": 2, "S": 72}).kernels
    assert [s.rows and s.rows.order for s in kernel.body.epilogue.stores] == [None, (0, 2, 1)]


@coda.block
def heads(q: T["B S 4 32"], k: T["B S 4 32"], v: T["B S 4 32"], r: T["B 4 S 1"]):
    scores = coda.einsum("b i h d, b j h d -> b h i j", q, k) * r
    e = coda.exp(scores)
    p = e / coda.sum(e, keepdims=True)
    return coda.einsum("b h i j, b j h d -> b i h d", p, v)


@coda.block
def softmaxed(q: T["B S 4 264"], k: T["B S 4 264"], v: T["B S 4 264"]):
    """Of more columns than attention kernels have."""
    scores = coda.einsum("b i h d, b j h d -> b h i j", q, k) * 0.125
    return coda.einsum("b h i j, b j h d -> b i h d", coda.softmax(scores), v)


def test_laws_of_sums_hold_for_each_head():
    """1 / Σ leaves p v, and the derivative of softmax reads no scores in a row-wise kernel."""
    sizes = {"B": 2, "S": 72}
    program = heads.lower("sm_90a", sizes)
    assert "× 72" not in "".join(t for t in show_program(program).splitlines() if "= rows" in t)
    scores, tokens = 2 * (2 * 4 * 72 * 72), 2 * (2 * 72 * 4 * 32)
    assert 2 * scores + 4 * tokens <= hbm_bytes(program) < 2 * scores + 4 * tokens + scores // 4

    _, backward = softmaxed.lower_training("sm_90a", sizes)
    assert "× 72" not in "".join(t for t in show_program(backward).splitlines() if "= rows" in t)


@coda.block
def by_hand(q: T["B S 4 264"], k: T["B S 4 264"], v: T["B S 4 264"]):
    e = coda.exp(coda.einsum("b i h d, b j h d -> b h i j", q, k) * 0.125)
    p = e / coda.sum(e, keepdims=True)
    return coda.einsum("b h i j, b j h d -> b i h d", p, v)


@pytest.mark.parametrize(
    ("block", "launches", "scores"), [(softmaxed, (3, 5), (5, 6)), (by_hand, (3, 6), (3, 6))]
)
def test_no_value_is_read_in_two_orders(block, launches, scores):
    """Σ dO O is taken in the order of tokens, in which O is returned, and stored in that of p v."""
    programs = block.lower_training("sm_90a", {"B": 2, "S": 8448})
    assert tuple(len(p.kernels) for p in programs) == launches
    assert TORCH not in {k.kind for p in programs for k in p.kernels}
    (store,) = programs[1].kernels[0].body.epilogue.stores
    assert store.rows.order == (0, 2, 1)
    matrix = 2 * (2 * 4 * 8448 * 8448)
    assert tuple(hbm_bytes(p) // matrix for p in programs) == scores


def test_the_gradient_of_a_transposed_operand_is_stored_as_it_is():
    @coda.block
    def f(p: T["B 3 S S"], v: T["B S 3 24"]):
        return coda.einsum("b h i j, b j h d -> b i h d", p, v)

    _, backward = f.lower_training("sm_90a", {"B": 2, "S": 72})
    assert [k.kind for k in backward.kernels] == [GEMM, GEMM]


@coda.block
def causal(q: T["B S 4 264"], k: T["B S 4 264"], v: T["B S 4 264"]):
    scores = coda.einsum("b i h d, b j h d -> b h i j", q, k) * 0.125
    i, j = coda.iota(q.shape[1]), coda.iota(k.shape[1])
    p = coda.softmax(coda.where(j <= i[:, None], scores, float("-inf")))
    return coda.einsum("b h i j, b j h d -> b i h d", p, v)


def test_a_mask_of_positions_moves_no_bytes():
    sizes = {"B": 2, "S": 8448}
    plain = [softmaxed.lower("sm_90a", sizes), *softmaxed.lower_training("sm_90a", sizes)]
    masked = [causal.lower("sm_90a", sizes), *causal.lower_training("sm_90a", sizes)]
    assert [hbm_bytes(p) for p in masked] == [hbm_bytes(p) for p in plain]
    assert [len(p.kernels) for p in masked] == [len(p.kernels) for p in plain]
    assert all("le column, row%8448" in str(p) for p in masked[:2])
    assert not any(p.prepared for p in masked)


@coda.block
def masks(q: T["B S 3 16"], k: T["B S 3 16"], c: T["S S"], h: T["3 S S"], m: T["B 1 S S"]):
    s = coda.einsum("b i h d, b j h d -> b h i j", q, k)
    return coda.tanh(s * 0.25 + c) + h * m


def test_matrices_that_batches_share_are_read_in_place():
    sizes = {"B": 2, "S": 72}
    program = masks.lower("sm_90a", sizes)
    (kernel,) = program.kernels
    heads, square = 2 * 72 * 3 * 16, 72 * 72
    assert hbm_bytes(program) == 2 * (2 * heads + (1 + 3 + 2) * square + 6 * square)
    assert all(s.in_place for s in kernel.body.spread.values())
    found = "{'c_': 'SHARED', 'h': 'SHARED_OUTSIDE', 'm': 'SHARED_INSIDE'}"
    assert found in program_source(program)


def test_a_shared_matrix_of_rows_that_tma_cannot_read_is_expanded():
    program = masks.lower("sm_90a", {"B": 2, "S": 67})
    (kernel,) = (k for k in program.kernels if k.kind is GEMM)
    assert not any(s.in_place for s in kernel.body.spread.values())

"""Results have the same bits at every schedule: nothing depends on what is computed at once."""

import numpy as np
import pytest
import torch

from coda import sim
from coda.sim.tensorcore import tcgen05, wgmma
from tests.sim import test_tcgen05 as tensor
from tests.sim import test_wgmma as group
from tests.sim.kernels import SCHEDULES, kernel, launch
from tests.sim.operands import offsets, put, random_matrix, size_of

STEPS = 5
WGMMA = [("bf16", "f32"), ("f16", "f32"), ("f16", "f16"), ("tf32", "f32"), ("e4m3", "f32")]
WGMMA += [("e5m2", "f16"), ("s8", "s32")]
TCGEN05 = [("f16", "bf16", "f32"), ("f16", "f16", "f16"), ("tf32", "tf32", "f32")]
TCGEN05 += [("f8f6f4", "e4m3", "f32"), ("f8f6f4", "e5m2", "f16"), ("i8", "s8", "s32")]


def same_bits(one, other):
    return one.tobytes() == other.tobytes()


@pytest.mark.parametrize("n", [8, 64, 256])
@pytest.mark.parametrize(("a", "d"), WGMMA)
def test_a_chain_of_wgmmas_has_the_bits_of_its_instructions(a, d, n):
    """Three warpgroups and five steps at once; each by itself; and cut after two steps."""
    rng = np.random.default_rng(7)
    smem = np.zeros((2, 200 * 1024), np.uint8)
    steps = []
    for i in range(STEPS):
        _, ra = random_matrix(rng, 64, 32 // size_of(a), a)
        _, rb = random_matrix(rng, n, 32 // size_of(a), a)
        where = [offsets(rows, size_of(a), 32, "k") for rows in (64, n)]
        for cta in range(2):
            put(smem[cta], 4096 * i, ra[::-1] if cta else ra, 32, "k", *where[0])
            put(smem[cta], 32768 + 8192 * i, rb, 32, "k", *where[1])
        left = group.describe(4096 * i, 32, *where[0])
        right = group.describe(32768 + 8192 * i, 32, *where[1])
        steps.append(([left] * 3, [right] * 3))
    words = ["p"] if d == "s32" else ["p", "1", "1", *(["0", "0"] if size_of(a) == 2 else [])]
    form = wgmma.parse_wgmma(group.opcode(n, a, a, d), ["{d}", "%a", "%b", *words])
    old = rng.standard_normal((3, 64, n)) * 3
    start = np.concatenate([group.registers_of(x, d) for x in old], axis=1)
    ctas, keep = [0, 1, 0], [True, False, True]

    def run(parts, groups, registers):
        first = [keep[g] for g in groups]
        for part in parts:
            mine = [([a[g] for g in groups], [b[g] for g in groups]) for a, b in part]
            which = [ctas[g] for g in groups]
            registers = wgmma.accumulate(form, smem, which, mine, first, registers)
            first = [True] * len(groups)
        return registers

    together = run([steps], [0, 1, 2], start)
    one_by_one = run([[s] for s in steps], [0, 1, 2], start)
    cut = run([steps[:2], steps[2:]], [0, 1, 2], start)
    alone = [run([steps], [g], start[:, 4 * g : 4 * g + 4]) for g in range(3)]
    assert same_bits(together, one_by_one)
    assert same_bits(together, cut)
    assert same_bits(together, np.concatenate(alone, axis=1))


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize(("kind", "a", "d"), TCGEN05)
def test_a_chain_of_tcgen05_has_the_bits_of_its_instructions(kind, a, d, ctas):
    rng = np.random.default_rng(3)
    m, n, k = 128 * ctas, 64, tensor.K[kind]
    smems = np.zeros((ctas, 160 * 1024), np.uint8)
    steps = []
    for i in range(STEPS):
        _, ra = random_matrix(rng, m, k, a)
        _, rb = random_matrix(rng, n, k, a)
        for cta, smem in enumerate(smems):
            left = tensor.place(smem, 8192 * i, ra[128 * cta : 128 * cta + 128], 32, "k")
            rows = slice(cta * n // ctas, (cta + 1) * n // ctas)
            right = tensor.place(smem, 65536 + 4096 * i, rb[rows], 32, "k")
        steps.append(tcgen05.MmaOperands(left, right, tensor.instruct(kind, m, n, a, a, d)))
    form = tcgen05.parse_mma(
        f"tcgen05.mma.cta_group::{ctas}.kind::{kind}", ["[d]", "a", "b", "i", "{m}", "p"]
    )
    old = rng.standard_normal((ctas, 128, 512)).astype(np.float32)
    if d == "f16":
        start = old.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        start = old.view(np.uint32)

    def run(parts, enable):
        tmems = start.copy()
        for part in parts:
            tcgen05.accumulate(form, smems, tmems, 0, part, enable=enable, disabled=[0] * 4 * ctas)
            enable = True
        return tmems

    for enable in (False, True):
        together = run([steps], enable)
        assert same_bits(together, run([[s] for s in steps], enable))
        assert same_bits(together, run([steps[:3], steps[3:]], enable))


def test_steps_do_not_depend_on_the_scales_of_others():
    """A factor beyond f32's exact range in one step leaves the other steps as they are."""
    rng = np.random.default_rng(5)
    m, n, kind = 128, 32, "mxf8f6f4"
    smem, steps = np.zeros((1, 65536), np.uint8), []
    start = rng.standard_normal((1, 128, 512)).astype(np.float32).view(np.uint32)
    for i in range(2):
        _, ra = random_matrix(rng, m, 32, "e5m2")
        _, rb = random_matrix(rng, n, 32, "e5m2")
        left = tensor.place(smem[0], 8192 * i, ra, 32, "k")
        right = tensor.place(smem[0], 32768 + 4096 * i, rb, 32, "k")
        for partition in range(4):
            for column, rows in ((300 + 8 * i, m), (400 + 8 * i, n)):
                codes = np.full((rows, 1), 127 if i else 64, np.uint8)
                tensor.put_scales(start[0], column, codes, 0, 0, partition)
        idesc = tensor.instruct(kind, m, n, "e5m2", "e5m2", scale=True)
        steps.append(tcgen05.MmaOperands(left, right, idesc, 300 + 8 * i, 400 + 8 * i))
    form = tcgen05.parse_mma(
        f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale",
        ["[d]", "a", "b", "i", "[sa]", "[sb]", "p"],
    )
    one, other = start.copy(), start.copy()
    tcgen05.accumulate(form, smem, one, 0, steps, enable=False)
    for k, step in enumerate(steps):
        tcgen05.accumulate(form, smem, other, 0, [step], enable=bool(k))
    assert same_bits(one, other)


def test_functions_have_the_same_bits_in_few_warps_and_in_many():
    """At random, some of the warps run at once: what approximates must not care."""
    ops = ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "rcp", "sqrt")
    names = [f"{op}.approx.f32" for op in ops]
    body = "mov.u32 %r1, %tid.x; mul.wide.u32 %rd8, %r1, 4; add.s64 %rd9, %rd8, %rd1; "
    body += "ld.global.b32 %r2, [%rd9]; add.s64 %rd9, %rd8, %rd0; "
    for k, name in enumerate(names):
        body += f"{name} %r3, %r2; st.global.b32 [%rd9+{1024 * k}], %r3; bar.sync 0; "
    text = kernel((body + "ret;").replace(";", ";\n"), parameters=2)
    x = np.random.default_rng(1).standard_normal(256).astype(np.float32)
    results = []
    for options in [*SCHEDULES, {"schedule": "random", "seed": 3}]:
        out = np.zeros(256 * len(names), np.float32)
        launch(text, out, x, block=256, **options)
        results.append(out.tobytes())
    assert len(set(results)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["warn", "off"])
@pytest.mark.parametrize(
    ("arch", "dtype", "tile", "pingpong"),
    [
        ("sm_90a", torch.bfloat16, (128, 64), False),
        ("sm_90a", torch.bfloat16, (64, 64), True),
        ("sm_100a", torch.bfloat16, (128, 64), False),
        ("sm_100a", torch.float32, (128, 64), False),
    ],
)
def test_gemms_of_quack_at_every_schedule(arch, dtype, tile, pingpong, checks, tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(1, 200, 320).to(dtype), torch.randn(1, 136, 320).to(dtype)
    with sim.device(arch, sms=2, checks=checks) as gpu:
        from quack.gemm import gemm

        results = []
        for schedule, seed in (("eager", 0), ("late", 0), *(("random", s) for s in range(4))):
            gpu.options = sim.Options(schedule, seed, gpu.options.checks)
            d = torch.zeros(1, 200, 136)
            gemm(a, b, d, None, None, *tile, 1, 1, pingpong=pingpong, persistent=True)
            results.append(d)
    want = a.double() @ b.double().mT
    unit = 2e-3 if dtype == torch.float32 else 1e-6
    assert (results[0] - want).norm() < unit * want.norm()
    assert all(torch.equal(results[0], r) for r in results)

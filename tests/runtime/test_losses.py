"""Losses over a vocabulary in training: what is stored, written over, and made in parts."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import coda
from coda.errors import CodaError
from coda.kernels.gemm.bind import GemmBinding
from coda.kernels.gemm.emit import emit_gemm
from coda.kernels.gemm.kind import GEMM
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.torch_op.kind import TORCH
from coda.lowering.algebra.training import MEMORY
from coda.lowering.program.access import Tile
from coda.lowering.program.epilogue import calls
from coda.lowering.program.memory import temporary_bytes
from coda.runtime import launcher as kernels
from coda.runtime.simulate import device

T = coda.Tensor
LLAMA = {"M": 8192, "D": 4096, "V": 128256}
GPT2 = {"M": 8192, "D": 768, "V": 50257}
PARTS = {"M": 40, "D": 16, "V": 600}  # so many words to so few columns that logits are cut


def head(reduction="mean", smoothing=0.0, z_loss=0.0, cap=0.0, wide=False):
    """A block of a vocabulary's projection and its loss."""

    def loss(x: T["M D"], w: T["V D"], y: T["M", coda.i64]):
        logits = x @ w.T
        logits = logits.cast(coda.f32) if wide else logits
        logits = coda.softcap(logits, cap) if cap else logits
        return coda.cross_entropy(logits, y, -100, reduction, smoothing, z_loss)

    return coda.block(loss)


def theirs(x, w, y, reduction="mean", smoothing=0.0, z_loss=0.0, cap=0.0, wide=False):
    logits = x @ w.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) if wide else logits
    logits = cap * torch.tanh(logits / cap) if cap else logits
    loss = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    loss = loss + z_loss * torch.logsumexp(logits, -1).square() * (y != -100)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (y != -100).sum()}[reduction]


VARIANTS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"cap": 30.0},
    {"smoothing": 0.1},
    {"z_loss": 1e-4},
    {"reduction": "sum", "cap": 30.0, "smoothing": 0.1, "z_loss": 1e-4, "wide": True},
    {"cap": 30.0, "smoothing": 0.1, "z_loss": 1e-4, "wide": True},
]


def stored(program):
    """Bytes that kernels write, by buffer."""
    epilogues = [k.body.epilogue for k in program.kernels if k.kind is not TORCH]
    names = [x.buffer for e in epilogues for x in (*e.stores, *e.sinks)]
    return {n: program.buffers[n].nbytes(program.sizes) for n in names}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("sizes", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_every_loss_is_a_gemm_and_folds(options, sizes, arch):
    block, logits = head(**options), 2 * sizes["M"] * sizes["V"]
    folds = {"none": 1}.get(options.get("reduction", ""), 2)
    forward, backward = block.lower_training(arch, sizes)
    assert [k.kind for k in forward.kernels].count(GEMM) == 1
    assert len(forward.kernels) == 1 + folds
    assert len(backward.kernels) == 3
    assert not any(k.kind is TORCH for k in (*forward.kernels, *backward.kernels))
    assert [n for n in stored(forward).values() if n >= logits] == [logits]
    assert temporary_bytes(backward) == 0  # the logits' gradient lies where the logits lay
    (new,) = backward.overwrites
    assert backward.buffers[backward.overwrites[new]].nbytes(sizes) == logits


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_speed_is_no_more_than_the_logits(options):
    """They are stored once, whatever is made of them: nothing else is as large."""
    programs = [head(**options).lower_training("sm_90a", LLAMA, memory=m) for m in MEMORY[1:]]
    balanced, speed = ([str(p) for p in both] for both in programs)
    assert balanced == speed


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("sizes", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_no_logits_are_stored_where_memory_counts(options, sizes):
    block, logits = head(**options), 2 * sizes["M"] * sizes["V"]
    forward, backward = block.lower_training("sm_90a", sizes, memory="min")
    assert max(stored(forward).values()) < logits // 50
    (cut,) = backward.cuts
    parts = len(cut.columns)
    assert sum(cut.columns) == sizes["V"]
    assert all(n % 256 == 0 for n in cut.columns[:-1])
    assert len(backward.kernels) == 3 * parts
    assert all(k.kind is GEMM for k in backward.kernels)
    most = cut.columns[0] * sizes["M"] * 2 + sizes["M"] * sizes["D"] * 4
    assert temporary_bytes(backward) == most
    assert f"made in {parts} parts" in str(block.explain_training(memory="min", **sizes))
    assert len({emit_gemm(backward, k).name for k in backward.kernels}) == 5


def test_small_logits_stay_whole():
    sizes = {"M": 64, "D": 4096, "V": 128256}
    backward = head().lower_training("sm_90a", sizes, memory="min")[1]
    assert not backward.cuts
    assert len(backward.kernels) == 3


def data(sizes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    m, d, v = (sizes[s] for s in "MDV")
    x = torch.randn(m, d, generator=g, dtype=torch.float64)
    w = torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5
    y = torch.randint(0, v, (m,), generator=g)
    y[::5] = -100
    return x.to(dtype), w.to(dtype), y


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("memory", ["min", "balanced", "speed"])
def test_gradients_are_torch_s(options, memory):
    x, w, y = data(PARTS)
    block = head(**{**options, "wide": False})
    mine = [t.clone().requires_grad_() for t in (x, w)]
    asked = [t.clone().requires_grad_() for t in (x, w)]
    loss, expected = (
        block(*mine, y, memory=memory, backend="reference"),
        theirs(*asked, y, **options),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    d = torch.randn_like(expected)
    loss.backward(d)
    expected.backward(d)
    for a, b in zip(mine, asked, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    x, w, y = data({"M": 6, "D": 3, "V": 7})
    for memory in ("min", "balanced"):
        block = head(smoothing=0.1, z_loss=0.01, cap=3.0)
        run = lambda *t, b=block, m=memory: b(*t, y, memory=m, backend="reference")  # noqa: E731
        assert torch.autograd.gradcheck(run, [x.requires_grad_(), w.requires_grad_()])


@coda.block
def last_layer(x: T["M D"], g: T["D"], w: T["V D"], b: T["V"], y: T["M", coda.i64]):
    return coda.cross_entropy(coda.layer_norm(x, g) @ w.T + b, y)


def test_parts_of_a_head_behind_a_norm_and_with_a_bias():
    """Statistics over the vocabulary are sums over its parts, and the bias' gradient is parts."""
    x, w, y = data(PARTS)
    g, b = torch.randn(16, dtype=torch.float64), torch.randn(600, dtype=torch.float64)
    program = last_layer.lower_training("sm_90a", PARTS, memory="min")[1]
    assert program.cuts
    assert not any(k.kind is TORCH for k in program.kernels)
    mine, asked = ([t.clone().requires_grad_() for t in (x, g, w, b)] for _ in range(2))
    last_layer(*mine, y, memory="min", backend="reference").backward()
    F.cross_entropy(F.linear(F.layer_norm(asked[0], (16,), asked[1]), *asked[2:]), y).backward()
    for a, e in zip(mine, asked, strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-9, atol=1e-11)


# What calls allocate, on the simulated device.


@pytest.fixture
def runs(monkeypatch):
    """Each call of a Program on the simulated device, with the most memory that it held at once."""
    found = []
    start, release = kernels.KernelRun.__init__, kernels.KernelRun.release

    def started(run, *args, **options):
        start(run, *args, **options)
        run.told = SimpleNamespace(most=0, program=run.program, stored=set(), complete=True)
        found.append(run.told)

    def released(run, names):
        own = {t.untyped_storage().data_ptr() for t in run.inputs.values()}
        tensors = [*run.buffers.values(), *run.raw.values()]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        run.told.most = max(run.told.most, sum(n for p, n in sizes.items() if p not in own))
        run.told.stored |= sizes.keys()
        run.told.complete = run.recording.complete
        release(run, names)

    monkeypatch.setattr(kernels.KernelRun, "__init__", started)
    monkeypatch.setattr(kernels.KernelRun, "release", released)
    return found


def train(block, sizes, memory, steps=(False,), keep=None):
    """Gradients of each backward of one forward, which retains its graph or not, and torch's."""
    x, w, y = data(sizes, torch.bfloat16)
    mine = [t.clone().requires_grad_() for t in (x, w)]
    asked = [t.double().requires_grad_() for t in (x, w)]
    loss = block(*mine, y, memory=memory, backend="sim")
    if keep is not None:
        keep.append(loss.grad_fn.saved_tensors)
    found = [torch.autograd.grad(loss, mine, retain_graph=retain) for retain in steps]
    return found, torch.autograd.grad(theirs(*asked, y), asked), loss, mine


def close(found, expected):
    for a, e in zip(found, expected, strict=True):
        assert float((a.double() - e).norm() / e.norm()) < 4e-3


SMALL = {"M": 40, "D": 64, "V": 264}


def test_a_backward_writes_over_the_logits_only_if_nobody_reads_them_again(runs):
    block, logits = head(), 2 * SMALL["M"] * SMALL["V"]
    gradients = 2 * SMALL["D"] * (SMALL["M"] + SMALL["V"])
    with device("sm_90a", checks="raise"):
        steps = True, True, False
        found, expected, loss, mine = train(block, SMALL, "balanced", steps)
        for one in found:
            close(one, expected)
        assert torch.equal(found[0][1], found[2][1])
        assert [r.most for r in runs[1:]] == [gradients + logits, gradients + logits, gradients]
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, mine)
        assert all(r.complete for r in runs)

        del runs[:]
        held = []
        found, expected, *_ = train(block, SMALL, "balanced", keep=held)
        close(found[0], expected)
        assert runs[1].most == gradients + logits  # somebody else has the logits


def test_a_failed_backward_is_not_begun_again(runs, monkeypatch):
    def fails(binding):
        raise MemoryError

    block = head()
    with device("sm_90a", checks="raise"):
        x, w, y = data(SMALL, torch.bfloat16)
        loss = block(x, w.requires_grad_(), y, backend="sim")
        with monkeypatch.context() as patch:
            patch.setattr(GemmBinding, "launch", fails)
            with pytest.raises(MemoryError):
                loss.backward()
        with pytest.raises(CodaError, match="has begun already"):
            loss.backward()


@pytest.mark.slow
def test_outputs_that_are_saved_are_not_written_over(runs):
    @coda.block
    def both(x: T["M D"], w: T["V D"], y: T["M", coda.i64]):
        logits = x @ w.T
        return logits, coda.cross_entropy(logits, y)

    x, w, y = data(SMALL, torch.bfloat16)
    with device("sm_90a", checks="raise"):
        logits, loss = both(x, w.requires_grad_(), y, backend="sim")
        before = logits.detach().clone()
        loss.backward()
        assert torch.equal(logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_parts_are_freed_one_after_the_other(runs, arch):
    sizes = {"M": 40, "D": 16, "V": 600}
    block = head()
    with device(arch, checks="raise") as gpu:
        found, expected, *_ = train(block, sizes, "min")
        close(found[0], expected)
        assert not gpu.report().findings
    program = runs[1].program
    assert len(program.kernels) == 6
    gradients = 2 * sizes["D"] * (sizes["M"] + sizes["V"])
    assert runs[1].most <= temporary_bytes(program) + gradients
    assert runs[1].complete


def test_parts_are_added_in_place(runs):
    sizes = {"M": 40, "D": 16, "V": 600}
    x, w, y = data(sizes, torch.bfloat16)
    w.requires_grad_()
    w.main_grad = torch.ones(w.shape)
    with device("sm_90a", checks="raise"), coda.accumulate_gradients():
        head()(x, w, y, memory="min", backend="sim").backward()
    asked = w.detach().double().requires_grad_()
    theirs(x.double(), asked, y).backward()
    close([w.main_grad - 1], [asked.grad])
    assert w.main_grad.untyped_storage().data_ptr() in runs[1].stored


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("memory", ["min", "balanced"])
@pytest.mark.parametrize("options", VARIANTS[3:], ids=str)
def test_hostile_sizes_in_the_simulator(options, memory, arch, runs):
    """One row more than tiles have, a vocabulary that no vector divides."""
    for sizes in ({"M": 129, "D": 64, "V": 257}, {"M": 33, "D": 72, "V": 1}):
        x, w, y = data(sizes, torch.bfloat16)
        mine = [t.clone().requires_grad_() for t in (x, w)]
        torchs = [t.clone().requires_grad_() for t in (x, w)]
        asked = [t.double().requires_grad_() for t in (x, w)]
        with device(arch, checks="raise") as gpu:
            head(**options)(*mine, y, memory=memory, backend="sim").sum().backward()
            assert not gpu.report().findings
        theirs(*asked, y, **options).sum().backward()
        theirs(*torchs, y, **options).sum().backward()
        for a, t, e in zip(mine, torchs, asked, strict=True):
            errors = [float((g.grad.double() - e.grad).norm()) for g in (a, t)]
            # Of one class it is 0, but for what two kernels' tanh differ by.
            assert errors[0] <= 1.1 * errors[1] + (5e-3 if sizes["V"] == 1 else 1e-6)
        assert sizes["V"] == 1 or all(r.complete for r in runs)
        runs.clear()


@pytest.mark.parametrize("memory", ["min", "balanced"])
@pytest.mark.parametrize("options", [{}, {"wide": True}, {"wide": True, "cap": 30.0}], ids=str)
def test_confident_rows_have_gradients_no_worse_than_torch_s(memory, options):
    """A softmax near 1 is the logits as they were stored, less a logsumexp of just these."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=g).bfloat16() for n in (64, 512))
    w = w * 1.25
    y = (x.float() @ w.float().T).argmax(-1)
    grads = []
    for kind in (torch.float64, torch.bfloat16, None):
        given = [t.to(kind or torch.bfloat16, copy=True).requires_grad_() for t in (x, w)]
        if kind is None:
            head(**options)(*given, y, memory=memory, backend="reference").backward()
        else:
            theirs(*given, y, **options).backward()
        grads.append([t.grad.double() for t in given])
    for exact, torchs, mine in zip(*grads, strict=True):
        assert (mine - exact).norm() <= 1.05 * (torchs - exact).norm()


@coda.block
def capped_behind_a_norm(x: T["M D"], w: T["D D"], g: T["D"], u: T["V D"], y: T["M", coda.i64]):
    return coda.cross_entropy(coda.softcap(coda.rms_norm(x @ w.T, g) @ u.T, 5.0), y)


@pytest.mark.parametrize("memory", ["balanced", "speed"])
def test_a_loss_of_saturated_logits_is_one_of_what_is_stored(memory):
    """What is kept is what tanh is taken of, and the logsumexp is of just that, rounded."""
    sizes = {"M": 64, "D": 64, "V": 256}
    forward = capped_behind_a_norm.lower_training("sm_90a", sizes, memory=memory)[0]
    gemm = list(gemms(forward))[-1]
    (kept,) = [s for s in gemm.body.epilogue.stores if isinstance(s.access, Tile)]
    assert not any(c.fn == "tanh" for c in calls(kept.lanes))
    for sink in gemm.body.epilogue.sinks:
        (rounding,) = [c for c in calls(sink.lanes) if c.fn == "rounded_bf16"]
        assert rounding.args == kept.lanes
    g = torch.Generator().manual_seed(0)
    x, w, u = (torch.randn(n, 64, generator=g).bfloat16() for n in (64, 64, 256))
    y = torch.randint(0, 256, (64,), generator=g)
    grads = []
    for kind in (torch.float64, torch.bfloat16, None):
        given = [t.to(kind or torch.bfloat16, copy=True).requires_grad_() for t in (x, w, u)]
        gain = torch.ones(64, dtype=given[0].dtype)
        if kind is None:
            loss = capped_behind_a_norm(*given[:2], gain, given[2], y, memory=memory)
        else:
            logits = F.rms_norm(given[0] @ given[1].T, (64,), gain, 1e-6) @ given[2].T
            loss = F.cross_entropy(5.0 * torch.tanh(logits / 5.0), y)
        loss.backward()
        grads.append([t.grad.double() for t in given])
    for exact, torchs, mine in zip(*grads, strict=True):
        assert (mine - exact).norm() < (torchs - exact).norm()


@coda.block
def by_log_softmax(x: T["M D"], w: T["V D"], y: T["M", coda.i64]):
    return coda.nll_loss(coda.log_softmax(x @ w.T), y)


@coda.block
def by_picking(x: T["M D"], w: T["V D"], y: T["M", coda.i64]):
    return -coda.mean(coda.pick(coda.log_softmax(x @ w.T), y)[:, 0], axis=0)


@coda.block
def next_words(x: T["B S D"], w: T["V D"], y: T["B S", coda.i64]):
    return coda.cross_entropy((x @ w.T)[:, :-1], y[:, 1:])


@pytest.mark.parametrize("memory", ["min", "balanced"])
def test_one_column_of_a_log_softmax_is_no_matrix(memory):
    for block in (by_log_softmax, by_picking):
        forward, backward = block.lower_training("sm_90a", LLAMA, memory=memory)
        like = head().lower_training("sm_90a", LLAMA, memory=memory)
        assert [type(k) for k in forward.kernels] == [type(k) for k in like[0].kernels]
        assert [type(k) for k in backward.kernels] == [type(k) for k in like[1].kernels]
        assert sum(stored(forward).values()) <= sum(stored(like[0]).values())
    x, w, y = data({"M": 6, "D": 3, "V": 7})
    run = lambda *t: by_log_softmax(*t, y, memory=memory, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(run, [x.requires_grad_(), w.requires_grad_()])


def test_logits_that_nobody_wants_are_not_computed():
    sizes = {"B": 4, "S": 2048, "D": 4096, "V": 128256}
    forward, backward = next_words.lower_training("sm_90a", sizes)
    assert [k.kind for k in forward.kernels].count(GEMM) == 1
    assert len(forward.kernels) == 3
    assert max(stored(forward).values()) == 2 * 4 * 2047 * 128256
    matrices = [k for k in backward.kernels if k.kind is TORCH]
    assert all(k.mainloop.node.shape[-1].constant != 128256 for k in matrices)
    x, w, y = torch.randn(2, 5, 3), torch.randn(7, 3), torch.randint(0, 7, (2, 5))
    mine, asked = ([t.double().requires_grad_() for t in (x, w)] for _ in range(2))
    next_words(*mine, y, backend="reference").backward()
    F.cross_entropy((asked[0] @ asked[1].T)[:, :-1].flatten(0, 1), y[:, 1:].flatten()).backward()
    for a, b in zip(mine, asked, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_targets_that_are_no_class():
    """NaN for a class that is not there; nothing for rows that do not count; NaN if none does."""
    x, w, y = data({"M": 8, "D": 4, "V": 6})
    each = head(reduction="none")
    y[1], y[2] = 6, -1
    loss = each(x, w, y, backend="reference")
    assert loss.isnan().tolist() == [False, True, True] + [False] * 5
    y[:] = -100
    x.requires_grad_()
    total = head(reduction="sum")(x, w, y, backend="reference")
    total.backward()
    assert total == 0
    assert not x.grad.any()
    assert head()(x, w, y, backend="reference").isnan()


@pytest.mark.parametrize(
    ("arch", "memory"),
    [
        (None, "min"),
        (None, "balanced"),
        (None, "speed"),
        *(
            pytest.param(arch, memory, marks=pytest.mark.slow)
            for arch in ("sm_90a", "sm_100a")
            for memory in MEMORY
        ),
    ],
)
def test_no_tokens_at_all(arch, memory):
    """The mean of nothing is NaN, its sum is 0, and gradients are 0; other sizes are as ever."""
    for reduction in ("mean", "sum", "none"):
        block, sizes = head(reduction=reduction), {"M": 5, "D": 64, "V": 72}
        x, w, y = data(sizes, torch.bfloat16)
        with device(arch) if arch else nullcontext():
            for rows in (0, 5):
                mine, asked = ([t.clone().requires_grad_() for t in (x[:rows], w)] for _ in "ab")
                found = block(*mine, y[:rows], memory=memory)
                expected = F.cross_entropy(asked[0] @ asked[1].T, y[:rows], reduction=reduction)
                torch.testing.assert_close(found, expected, equal_nan=True, rtol=2e-2, atol=2e-2)
                found.sum().backward()
                expected.sum().backward()
                for a, e in zip(mine, asked, strict=True):
                    torch.testing.assert_close(a.grad, e.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("memory", MEMORY)
def test_rows_that_all_count_nothing_have_no_gradient(memory):
    x, w, y = data({"M": 5, "D": 16, "V": 7})
    y[:] = -100
    mine, asked = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    head()(*mine, y, memory=memory).backward()
    F.cross_entropy(asked[0] @ asked[1].T, y).backward()
    for a, e in zip(mine, asked, strict=True):
        assert torch.equal(a.grad, e.grad)
        assert not a.grad.any()


def sweep(seed):
    """Options and arguments that were drawn by chance."""
    r = random.Random(seed)
    options = {
        "reduction": r.choice(["mean", "sum", "none"]),
        "smoothing": r.choice([0.0, 0.1, 1.0]),
        "z_loss": r.choice([0.0, 1e-4, 0.1]),
        "cap": r.choice([0.0, 1.0, 30.0]),
        "wide": r.random() < 0.5,
    }
    sizes = {"M": r.choice([1, 2, 33, 129]), "D": r.choice([8, 24, 64])}
    sizes["V"] = r.choice([2, 7, 31, 257, 509, 1021])
    dtype = r.choice([torch.bfloat16, torch.float16])
    x, w, y = data(sizes, seed=seed)
    x, w = (x * r.choice([1e-4, 1.0, 10.0, 1e3, 1e4])).to(dtype), w.to(dtype)
    if r.random() < 0.3:
        y = (x.double() @ w.double().T).argmax(-1)
    elif r.random() < 0.2:
        y[:] = 0
    return options, x, w, y


def check_sweep(seed, memory, arch=None):
    options, x, w, y = sweep(seed)
    results = []
    for kind in ("exact", "torch", "coda"):
        given = [t.double() if kind == "exact" else t.clone() for t in (x, w)]
        given = [t.requires_grad_() for t in given]
        run = head(**options) if kind == "coda" else theirs
        more = {"memory": memory} if kind == "coda" else options
        with device(arch, checks="raise") if arch and kind == "coda" else nullcontext() as gpu:
            loss = run(*given, y, **more)
            loss.sum().backward()
            assert gpu is None or not gpu.report().findings
        results.append([loss.detach(), *(t.grad for t in given)])
    for exact, torchs, mine in zip(*results, strict=True):
        ok = exact.isfinite() & torchs.isfinite()  # torch's own float16 overflows first
        assert mine[ok].isfinite().all()
        errors = [float((g.double() - exact)[ok].norm()) for g in (mine, torchs)]
        scale = float(exact[ok].norm()) * torch.finfo(x.dtype).eps
        assert errors[0] <= 1.15 * errors[1] + scale, (seed, errors, scale)


@pytest.mark.parametrize("memory", MEMORY)
def test_losses_drawn_by_chance(memory):
    for seed in range(12):
        check_sweep(seed, memory)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORY)
def test_many_losses_drawn_by_chance(memory):
    for seed in range(12, 200):
        check_sweep(seed, memory)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("seed", range(6))
def test_losses_drawn_by_chance_in_the_simulator(seed, arch):
    check_sweep(seed, MEMORY[seed % 3], arch)


def test_products_of_float32_are_refused_by_kernels_and_cast_by_autocast():
    x, w, y = data(SMALL, torch.float32)
    w.requires_grad_()
    with device("sm_90a"):
        with pytest.raises(CodaError, match="operands of one type of 8 or 16 bits"):
            head()(x, w, y)
        with torch.autocast("cpu", torch.bfloat16):
            head()(x, w, y).backward()
    asked = w.detach().clone().requires_grad_()
    theirs(x, asked, y).backward()
    assert w.grad.dtype == torch.float32
    close([w.grad], [asked.grad.double()])


@pytest.mark.parametrize("memory", ["min", "balanced"])
def test_infinite_logits_are_as_in_torch(memory):
    x, w, y = data({"M": 6, "D": 4, "V": 7})
    x, w[4], y[2] = x.abs(), -torch.inf, 4  # a class that nobody chooses, but for row 2
    mine, asked = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    loss = head(reduction="none")(*mine, y, memory=memory, backend="reference")
    expected = F.cross_entropy(asked[0] @ asked[1].T, y, reduction="none")
    torch.testing.assert_close(loss, expected)
    assert loss[2].isinf()
    x[1] = torch.inf
    assert not head(reduction="none")(x, w, y, backend="reference")[1].isfinite()

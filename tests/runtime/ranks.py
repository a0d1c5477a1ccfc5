"""What two processes do together: each check compares with one process that has it all."""

import os
import runpy
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import coda
from coda.errors import CallError
from coda.integrations.dynamo import backend
from coda.measure import random_inputs, relative
from coda.runtime.share import share
from tests.runtime.test_call import SIZES, mlp

T = coda.Tensor
ROOT = Path(__file__).parents[2] / "examples"


@coda.block
def feed_forward(x: T["M D"], g: T["D"], w_gate: T["F D"], w_up: T["F D"], w_down: T["D F"]):
    h = coda.rms_norm(x, g)
    return coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T


@coda.block
def rotated(x: T["M D"], g: T["D"], w: T["(H d) D"], cos: T["M d/2"], sin: T["M d/2"]):
    q = (coda.rms_norm(x, g) @ w.T).reshape("M (H d) -> M H d")
    return coda.rope(q, cos, sin)


@coda.block
def part_of_loss(x: T["M D"], w: T["V D"], target: T["M", coda.i64]):
    logits = x @ w.T
    inside = (target >= 0) & (target < logits.shape[-1])
    picked = coda.where(inside, coda.pick(logits, target)[:, 0], 0.0)
    return coda.logsumexp(logits), picked


def place(tensors, mesh, placements):
    return [
        distribute_tensor(t.detach(), mesh, p if isinstance(p, list) else [p]).requires_grad_()
        for t, p in zip(tensors, placements, strict=True)
    ]


def hold_against_one(block, sizes, mesh, placements, output, dims=None):
    inputs = [x.double() for x in random_inputs(block.graph, sizes)]
    whole = [x.requires_grad_() for x in inputs]
    expected = block(*whole, dims=dims)
    d = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected.backward(d)
    parts = place(inputs, mesh, placements)
    found = block(*parts, dims=dims)
    assert list(found.placements) == (output if isinstance(output, list) else [output])
    assert found.shape == expected.shape
    torch.testing.assert_close(found.full_tensor(), expected.detach())
    found.redistribute(placements=[Replicate()] * mesh.ndim).backward(
        distribute_tensor(d, mesh, [Replicate()] * mesh.ndim)
    )
    for mine, theirs in zip(parts, whole, strict=True):
        assert mine.grad.placements == mine.placements
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


def rows_are_shared_out(mesh):
    weights = [Replicate()] * 4
    hold_against_one(mlp, SIZES | {"M": 10}, mesh, [Shard(0), *weights], Shard(0))


def columns_and_rows_of_weights_are_shared_out(mesh):
    placements = [Replicate(), Replicate(), Shard(0), Shard(0), Shard(1)]
    hold_against_one(feed_forward, SIZES, mesh, placements, Partial())


def heads_are_shared_out(mesh):
    sizes = {"M": 6, "D": 16, "H": 4, "d": 8}
    placements = [Replicate(), Replicate(), Shard(0), Replicate(), Replicate()]
    dims = {"H": 4, "d": 8}
    hold_against_one(rotated, sizes, mesh, placements, Shard(1), dims)


def a_vocabulary_is_shared_out(mesh):
    """Each rank's logsumexp and picked logits, put together by torch, with their gradients."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (10, 600))
    target = torch.randint(0, 600, (10,), generator=generator)
    target[3] = -100
    whole = [t.clone().requires_grad_() for t in (x, w)]
    expected = torch.nn.functional.cross_entropy(whole[0] @ whole[1].T, target)
    expected.backward()
    for memory in ("min", "balanced"):
        rows, words = place([x, w], mesh, [Replicate(), Shard(0)])
        local = words.to_local()
        mine = target - mesh.get_local_rank() * len(local)
        here = rows.to_local(grad_placements=[Partial()])
        parts = torch.stack(part_of_loss(here, local, mine, memory=memory))
        every = DTensor.from_local(parts[None], mesh, [Shard(0)]).full_tensor()
        loss = (every[:, 0].logsumexp(0) - every[:, 1].sum(0))[target != -100].mean()
        torch.testing.assert_close(loss, expected)
        loss.backward()
        for found, one in zip((rows, words), whole, strict=True):
            torch.testing.assert_close(found.grad.full_tensor(), one.grad)


def rows_and_weights_on_a_mesh_of_two_axes(_):
    mesh = init_device_mesh("cpu", (1, 2))
    rows, columns, down = [Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Shard(1)]
    whole = [Replicate(), Replicate()]
    placements = [rows, whole, columns, columns, down]
    hold_against_one(feed_forward, SIZES, mesh, placements, [Shard(0), Partial()])


def local_tensors_are_plain(mesh):
    """Tensor parallel by hand: local weights in, a sum over ranks out."""
    x, g, *weights = (t.double() for t in random_inputs(mlp.graph, SIZES))
    whole = [t.clone().requires_grad_() for t in (x, g, *weights)]
    expected = mlp(*whole)
    expected.sum().backward()
    parts = place(weights, mesh, [Shard(0), Shard(0), Shard(1)])
    shared = place([x, g], mesh, [Replicate(), Replicate()])
    inside = [t.to_local(grad_placements=[Partial()]) for t in shared]
    y = DTensor.from_local(feed_forward(*inside, *(w.to_local() for w in parts)), mesh, [Partial()])
    found = shared[0] + y.redistribute(placements=[Replicate()])
    torch.testing.assert_close(found.full_tensor(), expected.detach())
    found.sum().backward()
    for mine, theirs in zip([*shared, *parts], whole, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


def refuse(message, block, tensors):
    with pytest.raises(CallError, match=message) as e:
        block(*tensors)
    assert e.value.help


def what_ranks_cannot_do_apart_is_refused(mesh):
    inputs = random_inputs(mlp.graph, SIZES)
    split = [Replicate(), Replicate(), Shard(0), Shard(0), Shard(1)]
    residual = place(inputs, mesh, split)
    refuse("only its part of the sum", mlp, residual)
    refuse(
        "`w_up` is not sharded as `F` is",
        mlp,
        place(inputs, mesh, [*split[:3], Replicate(), split[4]]),
    )
    columns = place(inputs, mesh, [Shard(1), Shard(0), Shard(1), Shard(1), Shard(0)])
    refuse("`mean", mlp, columns)
    refuse("`x` is a plain tensor", mlp, [inputs[0], *residual[1:]])
    summand = DTensor.from_local(inputs[0], mesh, [Partial()])
    refuse(r"`x` is Partial\(sum\)", mlp, [summand, *residual[1:]])


def example():
    return runpy.run_path(str(ROOT / "train_llama.py"), run_name="example")


def llama(names):
    torch.manual_seed(0)
    return names["Llama"](dim=32, hidden=48)


def sharded_gradients(mesh, accumulate=False, **options):
    """The relative error of FSDP2's gradients of two micro-batches against one process's."""
    names = example()
    tokens = next(names["batches"](1, batch=4, length=16))
    single, model = llama(names), llama(names)
    single(tokens).backward()
    fully_shard(model, mesh=mesh, **options)
    for step in range(2):
        model.set_requires_gradient_sync(step == 1)
        loss = model(tokens.chunk(2)[dist.get_rank()])
        if accumulate:
            with coda.accumulate_gradients():
                loss.backward()
        else:
            loss.backward()
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return max(relative(p.grad.full_tensor() / 2, q.grad) for p, q in pairs)


def ddp(_):
    names = example()
    tokens = next(names["batches"](1, batch=4, length=16))
    single, model = llama(names), llama(names)
    single(tokens).backward()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = tokens.chunk(2)[dist.get_rank()]
    with wrapped.no_sync(), coda.accumulate_gradients():
        wrapped(mine).backward()
    wrapped(mine).backward()
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert relative(p.grad / 2, q.grad) < 1e-5


def fsdp2(mesh):
    assert sharded_gradients(mesh) < 1e-5


def fsdp2_with_gradients_added_in_place(mesh):
    assert sharded_gradients(mesh, accumulate=True) < 1e-5


def fsdp2_in_bf16(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert sharded_gradients(mesh, mp_policy=policy) < 5e-2


class Gated(torch.nn.Module):
    """A gated MLP as torch writes it; notes why its weights are not moved in a call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (torch.nn.Linear(16, 32, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(32, 16, bias=False)
        self.seen = []

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

    def matrices(self):
        return self.gate.weight, self.up.weight


def steps(model, rank=None):
    """Three steps on the same rows, those of one rank or all; the weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(8, 16)
        optimizer.zero_grad()
        model(x if rank is None else x.chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def hold_against_plain(mesh, model):
    expected = steps(Gated())
    fully_shard(model, mesh=mesh)
    for found, exact in zip(steps(model, dist.get_rank()), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def fsdp2_of_weights_that_share_a_buffer(mesh):
    model = Gated()
    coda.share_weights(*model.matrices())
    hold_against_plain(mesh, model)
    with pytest.raises(CallError, match="not a plain parameter: DTensor"):
        coda.share_weights(*model.matrices())


def fsdp2_keeps_its_own_buffers(mesh):
    """What is gathered for a call is never moved, by hand or by the compiler."""
    model = Gated()
    forward = torch.compile(Gated.forward, backend=backend)

    def call(x):
        model.seen.append(share(model.matrices()))
        return forward(model, x)

    model.forward = call
    hold_against_plain(mesh, model)
    assert len(model.seen) == 3
    assert all("another tensor aliases" in why for why in model.seen)
    assert coda.last_report().fused
    assert coda.last_report().copied


CHECKS = (
    fsdp2_of_weights_that_share_a_buffer,
    fsdp2_keeps_its_own_buffers,
    rows_are_shared_out,
    columns_and_rows_of_weights_are_shared_out,
    heads_are_shared_out,
    a_vocabulary_is_shared_out,
    rows_and_weights_on_a_mesh_of_two_axes,
    local_tensors_are_plain,
    what_ranks_cannot_do_apart_is_refused,
    ddp,
    fsdp2,
    fsdp2_with_gradients_added_in_place,
    fsdp2_in_bf16,
)


def run_checks(rank, directory):
    """Run all checks as one of two processes; leave a file with a traceback for each that fails."""
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), "2"
    os.environ["CODA_FALLBACK"] = "eager"
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for check in CHECKS:
        try:
            check(mesh)
        except Exception:
            (directory / f"{check.__name__}.{rank}").write_text(traceback.format_exc())
    dist.destroy_process_group()

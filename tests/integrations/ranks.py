"""A tiny Llama on two processes, patched or compiled, held against one process that has it all."""

import os
import traceback

import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import coda
from coda.integrations.dynamo import backend
from tests.integrations.zoo import arguments, build, distance, step


def hold_against_one(mesh, model, call):
    """Two steps of SGD of sharded layers, each gradient beside that of one process."""
    given = arguments("Llama", batch=4)
    single = build("Llama")
    mine = {k: v.chunk(2)[dist.get_rank()] if torch.is_tensor(v) else v for k, v in given.items()}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, single)]
    for _ in range(2):
        _, _, expected = step(single, single, given)
        model.zero_grad()
        call(**mine).loss.backward()
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert distance(found[name], gradient) < 1e-4, name
        for optimizer in optimizers:
            optimizer.step()
    assert coda.last_report().fused > 20


def patched_layers(mesh):
    model = build("Llama")
    assert coda.patch(model).replaced == 2
    hold_against_one(mesh, model, model)


def a_compiled_model(mesh):
    model = build("Llama")
    hold_against_one(mesh, model, torch.compile(model, backend=backend))


CHECKS = (patched_layers, a_compiled_model)


def run_checks(rank, directory):
    """Run all checks in this process; what went wrong is left in a file of the check's name."""
    os.environ |= {"MASTER_ADDR": "localhost", "CODA_FALLBACK": "eager"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for check in CHECKS:
        torch._dynamo.reset()
        try:
            check(mesh)
        except Exception:
            (directory / f"{check.__name__}.{rank}").write_text(traceback.format_exc())
        dist.barrier()
    dist.destroy_process_group()

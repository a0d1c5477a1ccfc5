"""A torch that sees a GPU and logs every question about it: imported at a process's start."""

import os
from pathlib import Path

import torch


def _logged(name):
    def ask(*args, **kwargs):
        with Path(os.environ["CODA_TEST_DRIVER_LOG"]).open("a") as log:
            log.write(f"torch.cuda.{name}\n")
        raise RuntimeError("CUDA error: invalid device context")

    return ask


# tvm_ffi asks at its import
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
for _name in (
    "device_count",
    "current_device",
    "get_device_capability",
    "get_device_properties",
    "get_device_name",
    "current_stream",
    "synchronize",
    "_lazy_init",
):
    setattr(torch.cuda, _name, _logged(_name))

"""torch CPU tensors -> aliases marked as CUDA tensors, and the memory that kernels may access."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
import tvm_ffi
from torch import Tensor
from torch._C import _to_dlpack
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from coda.sim.types import Allocations, SimError

_CUDA = 2  # kDLCUDA
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def as_cuda(tensor: Tensor) -> Any:
    """A `tvm_ffi.Tensor` that aliases the same memory and is marked as on device cuda:0."""
    capsule = _to_dlpack(tensor.detach())
    address = _pointer(capsule, b"dltensor")
    assert address is not None
    # DLTensor: void *data; struct {int type, id;} device; ...
    ctypes.c_int.from_address(address + 8).value = _CUDA
    ctypes.c_int.from_address(address + 12).value = 0
    return tvm_ffi.from_dlpack(capsule)


@dataclasses.dataclass
class _Block:
    name: str
    nbytes: int
    alive: StorageWeakRef


class Memory:
    """The storages that kernels may access: of every tensor that was passed to a launch.

    Storages are not kept alive; a freed one is dropped, so that its address is out of bounds.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, _Block] = {}
        self.lock = threading.Lock()

    def add(self, tensor: Tensor, name: str = "") -> None:
        """Register a tensor's storage; a given name replaces an earlier one."""
        storage = tensor.untyped_storage()
        base, nbytes = storage.data_ptr(), storage.nbytes()
        if not nbytes:
            return
        with self.lock:
            block = self.blocks.get(base)
            if block is None or block.nbytes != nbytes or block.alive.expired():
                name = name or "tensor"
                self.blocks[base] = _Block(_label(name, tensor), nbytes, StorageWeakRef(storage))
            elif name:
                block.name = _label(name, tensor)

    def allocations(self) -> Allocations:
        """The live storages, under unique names."""
        found, names = Allocations(), set()
        with self.lock:
            for base in [b for b, block in self.blocks.items() if block.alive.expired()]:
                del self.blocks[base]
            for base, block in self.blocks.items():
                name, k = block.name, 2
                while name in names:
                    name, k = f"{block.name} #{k}", k + 1
                names.add(name)
                found.add(base, block.nbytes, name)
        return found


def _label(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name}: {dtype}[{', '.join(map(str, tensor.shape))}]"


def wrap(value: Any, memory: Memory, name: str = "") -> Any:
    """An argument of a compiled function with each CPU tensor in it replaced by `as_cuda`."""
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor):
            return value
        if value.device.type != "cpu":
            raise SimError(
                f"argument {name or '?'} is on {value.device}; the simulated device runs on CPU "
                "tensors: pass x.cpu()"
            )
        memory.add(value, name)
        return as_cuda(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = zip(value._fields, value, strict=True)  # type: ignore[attr-defined]
        return type(value)(*(wrap(v, memory, n) for n, v in pairs))
    if isinstance(value, list | tuple):
        return type(value)(wrap(v, memory, f"{name}[{k}]") for k, v in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _wrap_dataclass(value, memory)
    return value


def _wrap_dataclass(value: Any, memory: Memory) -> Any:
    changed = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name, None)
        new = wrap(old, memory, field.name)
        if new is not old:
            changed[field.name] = new
    if not changed:
        return value
    twin = object.__new__(type(value))
    twin.__dict__.update(value.__dict__)
    for name, new in changed.items():
        object.__setattr__(twin, name, new)
    return twin


_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_COPIES = (torch.Tensor.cuda, torch.Tensor.cpu)


def _is_cuda_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class CudaIsCpu(TorchFunctionMode):
    """In this thread, CPU tensors report `is_cuda`, and device "cuda" creates CPU tensors.

    Operators registered for CUDA alone (quack's) run their CUDA implementation, whose kernels are
    then simulated.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return args[0].device.type in ("cpu", "cuda")
        if func in _COPIES:
            return args[0].clone()
        if func is torch.Tensor.data_ptr:
            if not isinstance(args[0], FakeTensor):
                self.memory.add(args[0])
            return func(*args, **kwargs)
        implementation = _cuda_implementation(func)
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        moved = any(map(_is_cuda_device, (*args[:2], kwargs.get("device"))))
        if moved:
            args = tuple("cpu" if _is_cuda_device(a) else a for a in args)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            if func is torch.Tensor.to:
                kwargs = {**kwargs, "copy": True}
        return func(*args, **kwargs)


def _cuda_implementation(func: Any) -> Callable[..., Any] | None:
    """The Python implementation of a custom operator that is registered for CUDA alone."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        name = func._qualified_op_name
    elif isinstance(func, torch._ops.OpOverload):
        name = func._schema.name
    else:
        return None
    definition = OPDEFS.get(name)
    if definition is None or "cpu" in definition._backend_fns:
        return None
    return definition._backend_fns.get("cuda")

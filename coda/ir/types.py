"""Element types: coda's names, torch's and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coda.errors import DtypeError


@dataclass(frozen=True)
class DType:
    """An element type. `kind` is "float", "int" or "bool"; `size` is in bytes."""

    name: str
    torch: torch.dtype
    kind: str
    size: int

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"coda.{self.name}"

    def nearest(self, value: float) -> float:
        """A number rounded to this type, as torch rounds a number of Python; infinite beyond it."""
        if self.kind != "float":
            return value
        return torch.tensor(value, dtype=torch.float64).to(self.torch).item()


bf16 = DType("bf16", torch.bfloat16, "float", 2)
f16 = DType("f16", torch.float16, "float", 2)
f32 = DType("f32", torch.float32, "float", 4)
f64 = DType("f64", torch.float64, "float", 8)
e4m3 = DType("e4m3", torch.float8_e4m3fn, "float", 1)
e5m2 = DType("e5m2", torch.float8_e5m2, "float", 1)
i32 = DType("i32", torch.int32, "int", 4)
i64 = DType("i64", torch.int64, "int", 8)
bool_ = DType("bool", torch.bool, "bool", 1)

DTYPES: dict[str, DType] = {d.name: d for d in (bf16, f16, f32, f64, e4m3, e5m2, i32, i64, bool_)}
_FROM_TORCH = {d.torch: d for d in DTYPES.values()}
_RANK = (bool_, i32, i64, e5m2, e4m3, f16, bf16, f32, f64)


def from_torch(dtype: torch.dtype) -> DType | None:
    """The coda type of a torch dtype, or None where coda has none."""
    return _FROM_TORCH.get(dtype)


def dtype_of(value: DType | torch.dtype | str) -> DType:
    """A coda type, given as one, as torch's or by its name. Raises DtypeError."""
    found = DTYPES.get(value) if isinstance(value, str) else value
    found = from_torch(found) if isinstance(found, torch.dtype) else found
    if not isinstance(found, DType):
        raise DtypeError("there is no such element type", found=repr(value), help=", ".join(DTYPES))
    return found


def promote(*dtypes: DType) -> DType:
    """The widest of `dtypes`, in the order bool, ints, fp8, f16, bf16, f32, f64.

    f16 with bf16 gives f32, as in torch.
    """
    found = set(dtypes)
    if {f16, bf16} <= found:
        found.add(f32)
    return max(found, key=lambda d: _RANK.index(d) if d in _RANK else -1)

"""Element types: coda's names, torch's dtypes, and their widths and ranges in bits."""

# torch has no public function for what `nearest` needs (docs/private-apis.md).
# pyright: reportPrivateUsage=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from coda.errors import DtypeError


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: coda's name, as in the text form.
        torch: torch's dtype.
        kind: "float", "int" or "bool".
        bits: the width of one element in memory.
        digits: bits of the magnitude (for a float: of the significand, with the hidden bit).
        exponent: bits of a float's exponent.
        by_bytes: whether kernels store it as uint8: the DSL has no bool matrices, and a GPU's
            conversion to e5m2 saturates where torch's gives infinity.
    """

    name: str
    torch: torch.dtype
    kind: str
    bits: int
    digits: int
    exponent: int = 0
    by_bytes: bool = False

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"coda.{self.name}"

    @property
    def size(self) -> int:
        """Bytes of one element; for a type of fewer than 8 bits use `nbytes`."""
        return self.bits // 8

    def nbytes(self, count: int) -> int:
        """Bytes of `count` contiguous elements, rounded up."""
        return -(-count * self.bits // 8)

    @property
    def reaches_far(self) -> bool:
        """Whether its exponent range is at least that of float32."""
        return self.exponent >= 8

    def nearest(self, value: float) -> float:
        """Round a number to this dtype as torch rounds Python numbers; infinite if out of range."""
        if self.kind != "float":
            return value
        with _disable_current_modes():  # a default device, fake tensors
            return torch.tensor(value, dtype=torch.float64, device="cpu").to(self.torch).item()

    def holds(self, other: DType) -> bool:
        """Whether every value of `other` is exactly representable in this dtype."""
        reaches = self.kind == "float" or other.kind != "float"
        return reaches and self.digits >= other.digits and self.exponent >= other.exponent


def has_reciprocal(value: float) -> bool:
    """Whether a value and its reciprocal are normal in float32: x / v may be x * (1 / v)."""
    info = torch.finfo(torch.float32)
    return info.tiny <= abs(value) <= info.max and abs(1.0 / value) >= info.tiny


bf16 = DType("bf16", torch.bfloat16, "float", 16, 8, 8)
f16 = DType("f16", torch.float16, "float", 16, 11, 5)
f32 = DType("f32", torch.float32, "float", 32, 24, 8)
f64 = DType("f64", torch.float64, "float", 64, 53, 11)
e4m3 = DType("e4m3", torch.float8_e4m3fn, "float", 8, 4, 4)
e5m2 = DType("e5m2", torch.float8_e5m2, "float", 8, 3, 5, by_bytes=True)
i32 = DType("i32", torch.int32, "int", 32, 31)
i64 = DType("i64", torch.int64, "int", 64, 63)
bool_ = DType("bool", torch.bool, "bool", 8, 1, by_bytes=True)

DTYPES: dict[str, DType] = {d.name: d for d in (bf16, f16, f32, f64, e4m3, e5m2, i32, i64, bool_)}
_FROM_TORCH = {d.torch: d for d in DTYPES.values()}
_RANK = (bool_, i32, i64, e5m2, e4m3, f16, bf16, f32, f64)


def from_torch(dtype: torch.dtype) -> DType | None:
    """The coda type of a torch dtype; None if coda does not support it."""
    return _FROM_TORCH.get(dtype)


def dtype_of(value: DType | torch.dtype | str) -> DType:
    """The DType of a DType, a torch dtype or a name. Raises DtypeError for any other value."""
    found = DTYPES.get(value) if isinstance(value, str) else value
    found = from_torch(found) if isinstance(found, torch.dtype) else found
    if not isinstance(found, DType):
        raise DtypeError("there is no such element type", found=repr(value), help=", ".join(DTYPES))
    return found


def promote(*dtypes: DType) -> DType:
    """The widest of `dtypes`, in the order bool, ints, fp8, f16, bf16, f32, f64.

    f16 with bf16 gives f32, as in torch.
    """
    if dtypes and all(d is dtypes[0] for d in dtypes):
        return dtypes[0]
    found = set(dtypes)
    if {f16, bf16} <= found:
        found.add(f32)
    return max(found, key=lambda d: _RANK.index(d) if d in _RANK else -1)

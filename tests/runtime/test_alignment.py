"""What TMA cannot address is refused with a readable message, before any launch."""

import pytest
import torch

from coda.errors import CallError
from coda.kernels.gemm.quack_target import check_alignment


def test_rows_that_are_not_a_multiple_of_16_bytes_apart():
    with pytest.raises(CallError, match="rows of `A` are 14 bytes apart"):
        check_alignment({"A": torch.zeros(3, 7, dtype=torch.bfloat16)})


def test_a_base_off_the_grid():
    x = torch.zeros(4 * 8 + 1, dtype=torch.bfloat16)[1:].reshape(4, 8)
    with pytest.raises(CallError, match="does not begin at a multiple of 16 bytes"):
        check_alignment({"B": x})


def test_what_is_aligned_passes():
    x = torch.zeros(3, 8, dtype=torch.bfloat16)
    check_alignment({"A": x, "D": None, "eps": 1e-5})
    assert (x.data_ptr() % 16, x.stride(0) * x.element_size() % 16) == (0, 0)

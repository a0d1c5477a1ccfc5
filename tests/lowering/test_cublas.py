"""The frozen baseline: cuBLAS, as measured on an H200 and as modelled elsewhere."""

import pytest

from coda.lowering.program.cublas import H200, MEASURED, RATES, cublas_seconds, modelled
from coda.lowering.program.target import TARGETS

# (GPU, M, N, K): µs. What coda is compared with stays, whatever becomes of coda's own rates.
FROZEN = {
    ("H100 SXM", 8192, 4096, 4096): 378.8,
    ("H100 SXM", 2048, 28672, 4096): 662.5,
    ("H100 SXM", 16, 4096, 4096): 12.5,
    ("B200", 8192, 4096, 4096): 169.8,
    ("B200", 2048, 4096, 14336): 158.8,
    ("H200", 8192, 4096, 4096): 378.6,
}


def test_every_target_has_a_baseline():
    assert list(RATES) == [t.name for t in TARGETS]


@pytest.mark.parametrize("shape", FROZEN, ids=str)
def test_the_baseline_is_frozen(shape):
    assert cublas_seconds(*shape) * 1e6 == pytest.approx(FROZEN[shape], abs=0.05)


def test_what_was_measured_agrees_with_the_model():
    """No constant was fitted on these. Few rows miss: 15 µs for 10, 37 for 28."""
    many = {shape: us for shape, us in MEASURED.items() if shape[0] >= 512 and shape[1] != 1600}
    errors = [abs(modelled(H200, *shape) * 1e6 / us - 1) for shape, us in many.items()]
    assert len(errors) == 19
    assert sorted(errors)[9] < 0.03
    assert max(errors) < 0.09

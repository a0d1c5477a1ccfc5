"""The model of time beside what was measured, and the page docs/model.md."""

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import model
import model_page

from coda.lowering.program.cublas import RATES


def within(points, most):
    return [p.name for p in points if abs(p.error()) > most]


def test_the_layer_that_was_fitted():
    assert len(model.layer("8b")) == 12
    assert within(model.layer("8b"), 0.04) == []


def test_the_smaller_layer_is_predicted():
    """Nothing was fitted on it; its kernels had two to six stages."""
    assert len(model.layer("1b")) == 12
    assert within(model.layer("1b"), 0.12) == []


def test_the_tiles_are_predicted_but_one():
    assert len(model.tiles()) == 35
    assert within(model.tiles(), 0.12) == ["1×4096×14336 128x64 11"]


def test_no_small_step_of_a_constant_fits_better():
    """The constants of the target are those of the fit, up to their rounding."""
    present = model.present()
    found = model.fitted(present)
    for name in ("tensor", "feed", "two", "start", "latency"):
        assert getattr(found, name) == pytest.approx(getattr(present, name), rel=0.03)


@pytest.mark.parametrize("gpu", model.FROM)
def test_published_gemms(gpu):
    points = model.published(gpu)
    errors = model.errors(RATES[gpu], points)
    assert len(points) >= 20
    assert statistics.median(map(abs, errors)) < 0.1
    found = [p.us * (1 + e) for p, e in zip(points, errors, strict=True)]
    assert model.spearman([p.us for p in points], found) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("gpu", model.FROM)
def test_shapes_that_are_held_out(gpu):
    errors = [abs(e) for _, found in model.held_out(gpu) for e in found]
    assert statistics.median(errors) < 0.1


@pytest.mark.parametrize("family", model.FAMILIES, ids=str)
def test_lengths_of_attention_that_are_held_out(family):
    errors = [abs(b / a - 1) for _, a, b in model.attention(*family)][1:-1]
    assert len(errors) == 4
    assert statistics.median(errors) < 0.1


@pytest.mark.parametrize("write", model_page.QUICK, ids=lambda w: w.__name__)
def test_the_page_says_what_the_model_gives(write, request):
    text = model_page.PAGE.read_text()
    new = model_page.renewed(text, [write])
    if request.config.getoption("--update-golden"):
        model_page.PAGE.write_text(new)
    assert model_page.PAGE.read_text() == new

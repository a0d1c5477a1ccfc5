"""What is kept between calls: made of weights, and recorded launches."""

import enum
import gc
import weakref
from typing import NamedTuple

import pytest
import torch

from coda.runtime.replay import Recording, Replays, ReplayStep
from coda.runtime.weight_cache import Memo


@pytest.fixture
def made():
    return []


def test_a_value_is_made_again_only_when_a_tensor_has_changed(made):
    memo, w = Memo(), torch.ones(3)

    def make():
        made.append(w.clone())
        return made[-1]

    first = memo.get("b", [w], make)
    assert memo.get("b", [w], make) is first
    w.mul_(2)
    assert memo.get("b", [w], make).tolist() == [2, 2, 2]
    w.data = torch.full((3,), 5.0)
    assert memo.get("b", [w], make).tolist() == [5, 5, 5]
    assert len(made) == 3


def test_layers_keep_their_own(made):
    memo, layers = Memo(), [torch.ones(2) for _ in range(3)]
    for _ in range(2):
        for w in layers:
            memo.get("b", [w], lambda w=w: made.append(w) or w + 1)
    assert len(made) == 3


def test_a_value_dies_with_its_weights():
    memo, w = Memo(), torch.ones(3)
    memo.get("b", [w], lambda: torch.zeros(3))
    assert len(memo.entries) == 1
    del w
    gc.collect()
    assert not memo.entries


def record(x, w, folded):
    """A call of one row kernel: out[i] = x[i] · folded + (what the buffer held: zeros)."""
    recording = Recording([x, w])
    recording.constant(folded, [w])
    buffer = torch.zeros(2, 4)
    recording.made(buffer, 0.0)

    def kernel(x, f, out, rows):
        assert rows == 2
        out.add_(x * f)

    kernel(x[:, :2], folded, buffer[:, 1:3], 2)
    recording.launched(ReplayStep(kernel, (x[:, :2], folded, buffer[:, 1:3], 2)))
    return recording, (buffer[:, 1:3],)


def test_a_replay_and_its_copies_die_with_its_weights():
    x, w = torch.randn(2, 4), torch.randn(2)
    folded = w * 3
    copied = weakref.ref(folded)
    replays = Replays()
    replays.keep(*record(x, w, folded))
    del folded
    gc.collect()
    assert copied() is not None
    assert replays.find([x, w]) is not None
    del w
    gc.collect()
    assert copied() is None


def test_a_replay_launches_on_new_tensors():
    x, w = torch.randn(2, 4), torch.randn(2)
    recording, outputs = record(x, w, w * 3)
    replays = Replays()
    replays.keep(recording, outputs)
    for _ in range(2):
        fresh = torch.randn(2, 4)
        found = replays.find([fresh, w])
        (out,) = found.run([fresh, w])
        torch.testing.assert_close(out, fresh[:, :2] * (w * 3))
        assert out.data_ptr() != outputs[0].data_ptr()


class Order(enum.IntEnum):
    SERIAL = 0


class Options(NamedTuple):
    order: Order
    count: int


def test_a_replay_gives_tuples_with_tensors_anew_and_all_others_as_they_were():
    x, buffer, given = torch.randn(2, 4), torch.zeros(2, 4), []
    recording = Recording([x])
    recording.made(buffer, 0.0)
    options = Options(Order.SERIAL, 3)
    recording.launched(ReplayStep(lambda *args: given.append(args), (options, (x, (1, None)))))
    replays = Replays()
    replays.keep(recording, (buffer,))
    fresh = torch.randn(2, 4)
    replays.find([fresh]).run([fresh])
    ((found, (tensor, rest)),) = given
    assert found is options
    assert tensor is fresh
    assert rest == (1, None)


def test_a_replay_is_not_found_for_what_it_was_not_recorded_for():
    x, w = torch.randn(2, 4), torch.randn(2)
    replays = Replays()
    replays.keep(*record(x, w, w * 3))
    assert replays.find([x, w]) is not None
    assert replays.find([x, w.clone()]) is None
    assert replays.find([torch.randn(3, 4), w]) is None
    assert replays.find([x.double(), w]) is None
    assert replays.find([torch.randn(4, 2).T, w]) is None
    w.add_(1)
    assert replays.find([x, w]) is None


def test_a_call_that_copies_on_the_way_is_not_replayed():
    x, w = torch.randn(2, 4), torch.randn(2)
    recording, outputs = record(x, w, w * 3)
    recording.launched(ReplayStep(print, (x.clone(),)))
    replays = Replays()
    replays.keep(recording, outputs)
    assert replays.find([x, w]) is None


def test_parameters_written_past_torchs_count_are_seen_after_a_step(made):
    """Sharded training gathers new values into the same memory and keeps the version."""
    memo, w = Memo(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    replays = Replays()

    def value():
        return memo.get("b", [w], lambda: made.append(1) or w.detach() * 3)

    for step in range(3):
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((w,)):
            w.copy_(torch.full((2,), float(step)))
        assert value().tolist() == [3.0 * step] * 2
        assert value() is value()
        x = torch.randn(2, 4)
        replays.keep(*record(x, w, value()))
        assert replays.find([x, w]) is not None
        optimizer.step()
        assert replays.find([x, w]) is None
    assert len(made) == 3
    frozen = torch.ones(3)
    first = memo.get("c", [frozen], lambda: frozen * 3)
    optimizer.step()
    assert memo.get("c", [frozen], lambda: None) is first


def test_what_is_made_of_freed_parameters_is_forgotten():
    memo, layers = Memo(), [torch.ones(4) for _ in range(3)]
    for w in layers:
        memo.get("b", [w], lambda: torch.zeros(4))
        w.untyped_storage().resize_(0)
    assert len(memo.entries) == 1


def test_an_argument_is_returned_only_where_the_call_writes_over_it():
    x, total = torch.ones(2, 4), torch.zeros(2, 4)

    def kernel(x, out):
        out.add_(x)

    for updated in ([True], [False]):
        recording = Recording([x, total])
        kernel(x, total)
        recording.launched(ReplayStep(kernel, (x, total)))
        replays = Replays()
        replays.keep(recording, (total,), updated)
        found = replays.find([x, total])
        assert (found is not None) == updated[0]
        if found is not None:
            other = torch.full((2, 4), 5.0)
            (out,) = found.run([x, other])
            assert out is other
            assert bool((other == 6).all())


def test_what_torch_makes_in_a_call_is_made_again_of_the_new_arguments():
    x, w, seen = torch.randn(2, 4), torch.randn(2), []
    recording = Recording([x, w])
    packed = x * 2
    recording.computed(packed, lambda a: seen.append(a) or a * 2, [x])
    buffer = torch.zeros(2, 4)
    recording.made(buffer, 0.0)
    assert all(map(recording.knows, (x, packed[:1], buffer)))
    assert not recording.knows(x.clone())

    def kernel(p, out):
        out.add_(p)

    recording.launched(ReplayStep(kernel, (packed[:, 1:], buffer[:, 1:])))
    replays = Replays()
    replays.keep(recording, (buffer,))
    other = torch.randn(2, 4)
    (out,) = replays.find([other, w]).run([other, w])
    (made_of,) = seen
    assert made_of is other
    torch.testing.assert_close(out[:, 1:], other[:, 1:] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotated", "modulated"])
def test_a_replay_with_other_tables_in_the_simulator(name):
    from coda.kernels.gemm import quack_target
    from coda.lowering.compiler import lower
    from coda.measure import random_inputs
    from coda.runtime.launcher import KernelRun
    from coda.runtime.reference import run_reference
    from coda.runtime.simulate import device
    from tests.lowering import test_spread

    block = getattr(test_spread, name)
    sizes = {s: test_spread.SIZES[s] for s in block.graph.symbols}
    program = lower(block.graph, sizes)
    quack_target.cover_our_sources()
    first, second = (random_inputs(block.graph, sizes, seed) for seed in (0, 1))
    for inputs in (first, second):  # x as attention leaves it, with other axes before the tokens
        inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    weights = [i for i, n in enumerate(block.graph.inputs) if program.is_weight(n)]
    assert weights
    for i in weights:
        second[i] = first[i]
    with device("sm_90a", checks="raise"):
        run = KernelRun(program, first, sizes)
        replay = run.recording.replay(run.run())
        assert replay is not None
        assert any(getattr(e, "place", -1) >= 0 for e in replay.events)
        found = replay.run(second)
    for a, b in zip(found, run_reference(program, second), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)

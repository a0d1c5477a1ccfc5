"""Parameters that share a buffer: what they keep, what is not moved, what replays do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import coda
from coda.errors import CallError
from coda.runtime.replay import Recording, Replays, ReplayStep
from coda.runtime.share import lie_together, share, shared_groups


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 8))


def own(*weights):
    return all(w.untyped_storage().nbytes() == w.numel() * w.element_size() for w in weights)


def test_parameters_stay_what_they_are(pair):
    before = [(w, w.detach().clone(), w._version) for w in pair]
    pair[0].grad = torch.ones(6, 8)
    coda.share_weights(*pair)
    assert lie_together(pair)
    for weight, value, version in before:
        assert torch.equal(weight, value)
        assert type(weight) is nn.Parameter
        assert weight.is_leaf
        assert weight.requires_grad
        assert not weight._is_view()
        assert weight.is_contiguous()
        assert weight._version == version
    assert torch.equal(pair[0].grad, torch.ones(6, 8))
    assert pair[0].untyped_storage().nbytes() == 10 * 8 * 4
    place = pair[0].data_ptr()
    coda.share_weights(*pair)  # is done already
    assert pair[0].data_ptr() == place


def test_a_change_of_one_leaves_the_other(pair):
    other = pair[1].detach().clone()
    coda.share_weights(*pair)
    versions = [w._version for w in pair]
    with torch.no_grad():
        pair[0].zero_()
    assert torch.equal(pair[1], other)
    assert [w._version for w in pair] == [versions[0] + 1, versions[1]]


def test_old_memory_is_given_back_part_by_part():
    weights = [nn.Parameter(torch.randn(4, 8)) for _ in range(3)]
    held = [StorageWeakRef(w.untyped_storage()) for w in weights]
    coda.share_weights(*weights)
    assert all(h.expired() for h in held)


NOT_MOVED = {
    "is a part of a larger memory": lambda a, b: (nn.Parameter(torch.randn(8, 8)[:4]), b),
    "is not a contiguous matrix": lambda a, b: (nn.Parameter(torch.randn(8, 6).T), b),
    "is not a plain parameter": lambda a, b: (a.detach(), b),
    "has no memory": lambda a, b: (nn.Parameter(torch.empty(4, 8, device="meta")), b),
    "has rows of 12 bytes": lambda a, b: (nn.Parameter(torch.randn(4, 3)),) * 2,
    "one of them is there twice": lambda a, b: (a, b, a),
    "they differ in width": lambda a, b: (a, nn.Parameter(torch.randn(4, 12))),
    "torch.bfloat16": lambda a, b: (a, nn.Parameter(b.detach().bfloat16())),
}


@pytest.mark.parametrize("why", NOT_MOVED)
def test_what_is_not_moved(pair, why):
    weights = NOT_MOVED[why](*pair)
    places = [w.data_ptr() for w in weights]
    with pytest.raises(CallError, match=why):
        coda.share_weights(*weights)
    assert [w.data_ptr() for w in weights] == places


def test_memory_that_somebody_else_looks_at_is_not_moved(pair):
    alias = pair[0].detach()
    assert "another tensor aliases" in share(pair)
    alias.zero_()
    assert pair[0].abs().max() == 0
    del alias
    y = torch.randn(2, 8, requires_grad=True) @ pair[1].T  # autograd keeps a view
    assert "another tensor aliases" in share(pair)
    y.sum().backward()
    del y
    assert share(pair) == ""


def test_parameters_of_an_inference_mode_are_not_moved_and_others_are_inside(pair):
    with torch.inference_mode():
        made = nn.Parameter(torch.randn(4, 8), requires_grad=False)
        assert "inference mode" in share((made, made))
        coda.share_weights(*pair)
    pair[0].data.add_(1)
    assert not pair[0].is_inference()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return coda.nn.GatedMLP(8, 16)


def test_gate_and_up_share_from_the_start_and_after_a_move(model):
    assert lie_together((model.gate_weight, model.up_weight))
    values = model.gate_weight.detach().clone()
    model.bfloat16()
    assert model.gate_weight.dtype == torch.bfloat16
    assert lie_together((model.gate_weight, model.up_weight))
    torch.testing.assert_close(model.gate_weight.float(), values, rtol=1e-2, atol=1e-2)
    coda.nn.GatedMLP(8, 16, device="meta").to_empty(device="cpu")


def test_state_dicts_files_and_copies(model):
    x = torch.randn(3, 8)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    apart = {n: t.clone() for n, t in model.state_dict().items()}
    plain = io.BytesIO()
    torch.save(apart, plain)
    assert file.tell() <= plain.tell()
    file.seek(0)
    other = coda.nn.GatedMLP(8, 16)
    other.load_state_dict(torch.load(file))
    assert lie_together((other.gate_weight, other.up_weight))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.gate_weight.zero_()
        assert torch.equal(model(x), expected)
    assert own(*copy.deepcopy(model).parameters())


def test_groups_are_found_by_memory(model, pair):
    assert shared_groups(model.named_parameters()) == [("gate_weight", "up_weight")]
    assert shared_groups([("a", pair[0]), ("b", pair[1])]) == []


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_an_optimizer_steps_as_it_would(model, options):
    twin = copy.deepcopy(model)  # whose weights lie apart
    for one in (model, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2, **options)
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            one(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
    assert lie_together((model.gate_weight, model.up_weight))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def recorded(replays, x, weights):
    """A call of a kernel that reads two weights as one matrix."""
    recording = Recording([x, *weights])
    recording.in_place(weights)
    whole = weights[0].detach().as_strided((10, 8), (8, 1))
    buffer = torch.zeros(x.shape[0], 10)
    recording.made(buffer, 0.0)

    def kernel(x, w, out):
        out.copy_(x @ w.T)

    recording.launched(ReplayStep(kernel, (x, whole, buffer)))
    replays.keep(recording, (buffer,))


def test_a_replay_sees_weights_change_and_ends_when_they_move(pair):
    coda.share_weights(*pair)
    replays, x = Replays(), torch.randn(3, 8)
    recorded(replays, x, pair)
    for _ in range(2):
        with torch.no_grad():
            pair[1].mul_(2)
        (y,) = replays.find([x, *pair]).run([x, *pair])
        torch.testing.assert_close(y, x @ torch.cat([w.detach() for w in pair]).T)
    pair[1].data = pair[1].data.clone()
    assert replays.find([x, *pair]) is None
    other = nn.Parameter(torch.randn(4, 8))
    coda.share_weights(*[nn.Parameter(p.detach().clone()) for p in pair])
    assert replays.find([x, pair[0], other]) is None


def test_a_replay_holds_no_weight_alive(pair):
    coda.share_weights(*pair)
    replays, x = Replays(), torch.randn(3, 8)
    recorded(replays, x, pair)
    memory = StorageWeakRef(pair[0].untyped_storage())
    for p in pair:
        p.data = p.data.clone()
    assert memory.expired()

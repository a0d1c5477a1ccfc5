"""Stages: what each requires is checked, what each leaves is recorded, shown and timed."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import coda
from coda.cli import main
from coda.errors import CodaError, InternalError
from coda.ir.graph import Map
from coda.ir.text import parse
from coda.ir.types import f16
from coda.lowering import compiler
from coda.lowering.algebra.chunk import Parted
from coda.lowering.algebra.policy import DEFAULT_POLICY
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.stages import STAGES, Stages, Trial

EXAMPLES = Path(__file__).parents[2] / "examples"
NORM = """block norm(%x: [M, 64] bf16, %w: [32, 64] bf16) {
  %0 = square %x
  %1 = mean %0 axis -1
  %2 = rsqrt %1
  %3 = mul %x, %2
  %4 = contract %3, %w bf16
  return y = %4
}"""
BODY = {
    "pushdown": "%0 = mul %x, %x return y = %0",
    "columns": "%0 = neg %x %1 = pick %0, %i return y = %1",
    "constants": "%0 = reshape %x [64*M] %1 = sum %0 axis -1 return y = %1",
    "attends": "%0 = size 64 f32 %1 = sqrt %0 %2 = mul %x, %1 return y = %2",
    "chunks": "%0 = size 64 f32 %1 = sqrt %0 %2 = mul %x, %1 return y = %2",
}


def block(body):
    return parse(f"block f(%x: [M, 64] bf16, %i: [M] i64) {{ {body} }}")


def forged():
    """A graph with a node whose type does not follow from its operands."""
    graph = parse("block f(%forged: [M, 64] bf16) { %0 = exp %forged return y = %0 }")
    node = Map("exp", (graph.inputs[0],))
    object.__setattr__(node, "dtype", f16)
    return graph


def placed(text=NORM):
    return lower(parse(text), {"M": 8})


def broken(name):
    """A value that the stage `name` does not take, and what is said of it."""
    if name == "laws":
        return forged(), "its shape and element type do not follow"
    if name in BODY:
        said = {
            "pushdown": "square_of_product",
            "columns": "closer to an argument",
            "constants": "rows and columns at once",
            "attends": "is not evaluated",
            "chunks": "is not evaluated",
        }
        return block(BODY[name]), said[name]
    if name == "place":
        graph, other = parse(NORM), block("%0 = exp %x return y = %0")
        return Parted(
            graph, (), {other.roots[0]: 0}
        ), "a chunk refers to a node that is not in the graph"
    program = placed()
    if name == "factor":
        return replace(program, kernels=program.kernels[1:]), "before it is written"
    if name in ("order", "configure"):
        return program, "memory is planned already"
    folded = lower(parse(SPLIT), {"M": 8})
    return without_counts(folded), "whose partials have no size"


SPLIT = """block split(%x: [M, 64] bf16, %w: [64, 64] bf16) {
  %0 = contract %x, %w bf16
  %1 = square %0
  %2 = mean %1 axis -1
  %3 = mul %0, %2
  return y = %3
}"""


def without_counts(program):
    """A Program whose kernels do not know how many values are in each partial that they fold."""

    def changed(kernel):
        epilogue = kernel.body.epilogue
        statistics = tuple(replace(s, count=0) for s in epilogue.statistics)
        epilogue = replace(epilogue, statistics=statistics)
        return replace(kernel, body=replace(kernel.body, epilogue=epilogue))

    return replace(program, kernels=tuple(map(changed, program.kernels)))


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_requires_is_checked(name):
    value, said = broken(name)
    ran = []
    with pytest.raises(InternalError, match=said):
        Trial(2)(name, ran.append, value)
    assert not ran


def test_what_a_stage_leaves_is_checked():
    good = block("%0 = exp %x return y = %0")
    with pytest.raises(InternalError, match="after `pushdown`: its shape and element type"):
        Trial(2)("pushdown", lambda _: forged(), good)


def test_every_law_is_checked(monkeypatch):
    law = next(one for one in compiler.LAWS if one.name == "square_of_product")
    wrong = replace(law, name="wrong")
    object.__setattr__(wrong, "apply", lambda node: forged().roots[0])
    monkeypatch.setattr(compiler, "LAWS", (wrong,))
    graph = block("%0 = mul %x, %x return y = %0")
    with pytest.raises(InternalError, match="after `wrong`"):
        lower(graph, {"M": 8}, stages=Stages(2))


def test_a_law_by_which_nothing_falls_is_noticed(monkeypatch):
    law = next(one for one in compiler.LAWS if one.name == "square_of_power")
    turned = replace(law, name="turned", left=law.right, right=law.left)
    monkeypatch.setattr(compiler, "LAWS", (turned,))
    graph = parse("block f(%x: [M, 64] f32) { %0 = square %x return y = %0 }")
    with pytest.raises(InternalError, match="after `turned`: no measure of the graph fell"):
        lower(graph, {"M": 8}, stages=Stages(2))


def test_the_level_says_when_a_fault_is_found(monkeypatch):
    """At 0 never, at 1 with the Program, at 2 where it was made."""
    graph = parse(NORM)
    lost = lambda program: replace(program, kernels=program.kernels[1:])  # noqa: E731
    monkeypatch.setattr(compiler, "factor", lost)
    assert len(lower(graph, {"M": 8}, stages=Stages(0)).kernels) == 1
    with pytest.raises(InternalError, match="after `memory`"):
        lower(graph, {"M": 8}, stages=Stages(1))
    with pytest.raises(InternalError, match="after `factor`"):
        lower(graph, {"M": 8}, stages=Stages(2))


@pytest.mark.parametrize(("file", "memory"), [("llama_mlp", "min"), ("gpt2_layer", "balanced")])
def test_examples_pass_every_check(file, memory):
    made = runpy.run_path(str(EXAMPLES / f"{file}.py"))
    graph = made["mlp" if "mlp" in made else "layer"].graph
    sizes = {s: {"M": 256, "D": 128, "F": 512, "H": 4, "d": 32}[s] for s in graph.symbols}
    training = derive(graph, sizes, memory=memory)
    for one, policy in ((training.forward, DEFAULT_POLICY), (training.backward, training.policy())):
        record = Stages(2)
        program = lower(one, {s: sizes[s] for s in one.symbols}, policy=policy, stages=record)
        assert [r.stage.name for r in record.kept.ran] == list(STAGES)
        assert record.kept.ran[-1].after is program
        assert record.kept.steps == list(program.steps)


def test_a_lowering_that_fails_shows_how_far_it_came(monkeypatch):
    def fail(program):
        raise RuntimeError("here")

    shown = []
    monkeypatch.setattr(compiler, "factor", fail)
    with pytest.raises(RuntimeError):
        lower(parse(NORM), {"M": 8}, stages=Stages(1, ("laws", "memory"), shown.append))
    assert [text.splitlines()[0] for text in shown] == ["# after laws"]


def test_settings_say_what_is_shown_and_checked(monkeypatch, capsys):
    monkeypatch.setenv("CODA_SHOW", "laws, place")
    coda.parse(NORM).lower("sm_90a", {"M": 8})
    out, err = capsys.readouterr()
    assert not out
    assert err.index("# after laws\nblock norm") < err.index("# after place\nprogram norm")
    monkeypatch.setenv("CODA_SHOW", "lows")
    with pytest.raises(CodaError, match="CODA_SHOW: there is no such stage"):
        coda.parse(NORM).lower("sm_90a", {"M": 16})
    monkeypatch.delenv("CODA_SHOW")
    monkeypatch.setenv("CODA_CHECK", "3")
    with pytest.raises(CodaError, match="CODA_CHECK is one of 0, 1, 2"):
        coda.parse(NORM).lower("sm_90a", {"M": 32})


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out = capsys.readouterr()
    return stopped.value.code or 0, out.out, out.err


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "norm.coda"
    path.write_text(NORM)
    return str(path)


def test_passes_are_listed(capsys, file):
    options = ("explain", file, "--dims", "M=8")
    _, out, _ = run(capsys, *options, "--passes", "--json")
    found = json.loads(out)["norm"]
    assert [s["stage"] for s in found["stages"]] == list(STAGES)
    laws, place = found["stages"][0], found["stages"][6]
    assert "row_factor_past_contraction" in laws["did"]
    assert (place["before"], place["after"]) == ("7 nodes", "2 kernels")
    assert all(s["seconds"] >= 0 for s in found["stages"])
    assert (found["lowerings"], found["kept"]) == (1, 1)
    _, out, _ = run(capsys, *options, "--passes", "--backward")
    assert "norm_backward" in out
    assert out.count("│ configure") == 2


def test_explain_stops_after_a_stage_and_the_next_takes_it_up(capsys, file, tmp_path):
    code, out, _ = run(capsys, "explain", file, "--dims", "M=8", "--stop-after", "laws")
    assert code == 0
    assert out.startswith("# after laws\nblock norm")
    assert "rows0" not in out
    lawful = tmp_path / "lawful.coda"
    lawful.write_text(out)
    _, alone, _ = run(capsys, "stage", "memory", str(lawful), "--dims", "M=8")
    _, whole, _ = run(capsys, "explain", file, "--dims", "M=8", "--stop-after", "memory")
    assert whole == f"# after memory\n{alone}\n"


def test_a_stage_takes_what_the_stages_before_it_leave(capsys, file):
    file = Path(file)
    file.write_text(NORM.replace("square %x", "mul %x, %x"))
    code, _, err = run(capsys, "stage", "pushdown", str(file), "--dims", "M=8")
    assert code == 2
    assert "`square_of_product` still applies" in err
    for options in (("stage", "law", str(file)), ("explain", str(file), "--stop-after", "law")):
        code, _, err = run(capsys, *options, "--dims", "M=8")
        assert code == 2
        assert "there is no such stage" in err
        assert "laws, pushdown" in err

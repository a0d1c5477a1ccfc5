"""The docs are true: their snippets run, and the page of the laws is what the code says."""

import re
import runpy
from pathlib import Path

import pytest

import coda
from coda.frontend.torch_import.decompose import DECOMPOSED
from coda.frontend.torch_import.left import rows, why_left
from coda.frontend.torch_import.operators import RULES
from coda.lowering.algebra.laws import EXCHANGES, LAWS
from coda.runtime.settings import VARIABLES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HEAD = """# The laws

A law is an equation between two small graphs over variables with axes, in
`coda/lowering/algebra/laws.py`. From the one definition come the matcher, the replacement, and
the property test that evaluates both sides in float64. `...` stands for any leading axes, a letter
for an axis, 1 for a value that does not depend on it, `*` for the batch axes of a batched
contraction, each of its size or 1, and for none in a contraction with a matrix; ᵖ is one
permutation of all axes but the last. Laws are applied from left to right, operands first, until
none applies; those marked *choice* only where the Program becomes cheaper, by modelled time. A
row factor moves past a contraction only if it becomes available after the kernel that produces the
other operand. Laws that subtract a mean after the sum, or a logsumexp, do not apply to values that
are float32 from the start: these would lose bits. Laws marked *far* store
values without a factor or a shift that is applied later; such values may be far larger or smaller,
so these laws apply to types with the exponent range of float32, and not to f16.

The exchange of two contractions is tried on derivatives: where the forward has the other
contraction, or (in `coda/lowering/algebra/linear.py`) where the outputs of the block are linear in
the value that a row factor multiplies.

| law | identity | over |
|---|---|---|
"""


def laws_page():
    rows = []
    for law in (*LAWS, *EXCHANGES):
        over = ", ".join(f"{n}[{v}]" for n, v in law.variables.items())
        identity = re.sub(r"([\[|])", r"\\\1", law.identity.split("\n")[0])
        marks = [m for m, has in (("choice", law.choice), ("far", law.unscaled)) if has]
        marked = f" (*{', '.join(marks)}*)" if marks else ""
        rows.append(f"| `{law.name}`{marked} | {identity} | {over} |")
    return HEAD + "\n".join(rows) + "\n"


def test_the_page_of_the_laws(request):
    path = ROOT / "docs/laws.md"
    if request.config.getoption("--update-golden"):
        path.write_text(laws_page())
    assert path.read_text() == laws_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_snippets_run(page):
    names = {"__name__": "docs"}
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(found) == page.read_text().count("```python")
    for text in found:
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_page_of_the_api_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    told = set(re.findall(r"^::: coda\.(\w+)$", page, re.M))
    told |= set(re.findall(r"Element types: `(.*?)`", page)[0].split())
    assert set(coda.__all__) - told == {"__version__"}


def test_the_site_has_every_page():
    nav = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert nav == pages | {"index.md", "contributing.md", "changelog.md"}


def test_the_page_of_explain_has_every_kind_of_operand():
    page = (ROOT / "docs/explain.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    layer, mlp = (runpy.run_path(str(ROOT / f"examples/llama_{n}.py"))[n] for n in ("layer", "mlp"))
    found = [layer.explain("sm_90a", M=256, D=256, F=512, H=4, G=2, d=64)]
    both = mlp.explain_training("sm_90a", M=256, D=256, F=512)
    found += [both.forward, both.backward]
    operands = [o for e in found for k in e.json()["kernels"] for o in k.get("operands", ())]
    kinds = {o.split()[1] for o in operands}
    assert len(kinds) >= 4
    assert kinds <= told


def test_the_page_of_models_has_every_operator_that_stays_torch_s(request):
    page = ROOT / "docs/models.md"
    head, mark = page.read_text().partition("| why | operators |\n|---|---|\n")[:2]
    assert mark
    table = [f"| {why} | {', '.join(f'`{n}`' for n in names)} |\n" for why, names in rows()]
    if request.config.getoption("--update-golden"):
        page.write_text(head + mark + "".join(table))
    assert page.read_text() == head + mark + "".join(table)


def test_no_operator_with_a_rule_is_said_to_stay_torch_s():
    assert not [str(op) for op in (*RULES, *DECOMPOSED) if why_left(op)]


def test_the_readme_shows_what_explain_prints():
    python, shown = re.findall(r"```(?:python|text)\n(.*?)```", PAGES[0].read_text(), re.S)[:2]
    names = {}
    exec(python.replace("print(", "found = str("), names)
    lines = [line.rstrip() for line in names["found"].splitlines()]
    missing = [line for line in shown.splitlines() if line not in lines]
    assert not missing


def test_the_tutorial_ends_with_the_settings(request):
    page = ROOT / "docs/tutorial.md"
    head, mark = page.read_text().partition("|---|---|---|\n")[:2]
    rows = [
        f"| `{v.name}` | {v.meaning} | {', '.join(f'`{x}`' for x in v.values if x)} |\n"
        for v in VARIABLES
    ]
    if request.config.getoption("--update-golden"):
        page.write_text(head + mark + "".join(rows))
    assert page.read_text() == head + mark + "".join(rows)

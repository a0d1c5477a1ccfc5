"""The house keeps its order: imports run one way, files and functions stay short."""

import ast
import re
from collections import Counter
from pathlib import Path

from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "coda").rglob("*.py"))
# From the bottom: a package imports those before it. The face and the integrations know them all.
ORDER = (
    "sim",
    "errors version",
    "ir",
    "frontend",
    "frontend.torch_import",
    "lowering.algebra",
    "lowering.program",
    "lowering.placement",
    "kernels",
    "kernels.gemm kernels.rowwise kernels.torch_op",
    "kernels.__init__",
    "lowering",
    "runtime",
    "block border check cli doctor measure nn options integrations",
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
FRONTEND = RANK["frontend"], RANK["frontend.torch_import"]


def module_of(file):
    return ".".join(file.relative_to(ROOT / "coda").with_suffix("").parts)


MODULES = {module_of(f) for f in FILES}


def package_of(module):
    """The longest ranked package that a module of coda is in."""
    parts = module.split(".")
    return next(p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in RANK)


def imported(tree):
    """The modules of coda that a file imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name[5:] for a in node.names if a.name.startswith("coda."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coda":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"[5:]
                found = whole if whole in MODULES or whole in RANK else node.module[5:]
                yield found or alias.name


def test_imports_run_one_way():
    wrong = []
    for file in FILES:
        module = module_of(file)
        if module in ("__init__", "__main__"):
            continue
        mine = package_of(module)
        for other in map(package_of, imported(ast.parse(file.read_text()))):
            up = RANK[other] > RANK[mine] or (RANK[other] == RANK[mine] and other != mine)
            frontend = RANK[other] in FRONTEND and RANK[mine] not in (*FRONTEND, RANK["block"])
            if (up or frontend) and RANK[mine] < RANK["block"]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_arch_is_compared_outside_the_targets():
    """What an arch can do is said by its Target; the simulator is a machine of its own."""
    found = []
    for file in FILES:
        if file.name == "target.py" or module_of(file).startswith("sim."):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare | ast.Dict | ast.Subscript | ast.MatchValue):
                named = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                if any(isinstance(v, str) and v.startswith("sm_") for v in named):
                    found.append(f"{module_of(file)}:{node.lineno}")
    assert not found


WRITES = ("update", "setdefault", "pop", "popitem", "clear", "putenv", "unsetenv")


def is_environment(node):
    """Whether an expression is `os.environ`, or an element of it."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def test_nothing_writes_the_environment():
    """A process's environment belongs to its user; processes of ours are started with their own."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            targets = [getattr(node, "target", None), *getattr(node, "targets", [])]
            wrong = isinstance(
                node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete
            ) and any(map(is_environment, filter(None, targets)))
            called = getattr(node, "func", None)
            if isinstance(called, ast.Attribute) and called.attr in WRITES:
                wrong = is_environment(called.value) or called.attr in ("putenv", "unsetenv")
            if wrong:
                found.append(f"{module_of(file)}:{node.lineno}")
    assert not found


def test_a_class_name_names_one_class():
    named = Counter(
        node.name
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in named.items() if count > 1] == []


FILLS = {"append", "add", "extend", "insert", "setdefault", "update"}


def filled(tree):
    """The names of the tables into which the statements of a tree write, and where they do."""
    for node in ast.walk(tree):
        called = getattr(node, "func", None)
        if isinstance(called, ast.Attribute) and called.attr in FILLS:
            yield ast.unparse(called.value).split(".")[0].split("[")[0], node.lineno
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield ast.unparse(node.value).split(".")[0].split("[")[0], node.lineno


def at_import(tree):
    """The expressions that a module runs when it is imported: decorators, not bodies."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from node.decorator_list
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def names_of_coda(tree):
    """Name in a module -> (module, name) of coda that it was imported from."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coda":
            found |= {a.asname or a.name: (node.module[5:], a.name) for a in node.names}
    return found


def registrars(tree):
    """The functions of a module that write into one of its tables: calls of them register."""
    tables = {
        ast.unparse(target)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in getattr(node, "targets", [getattr(node, "target", None)])
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            own = {a.arg for a in node.args.args}
            own |= {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            if any(name in tables - own for name, _ in filled(node)):
                yield node.name


def registered(trees):
    """Where a module writes into another one's table when it is imported."""
    writers = {(m, n) for m, tree in trees.items() for n in registrars(tree)}
    for module, tree in trees.items():
        imported_names = names_of_coda(tree)
        for node in at_import(tree):
            for name, line in filled(node):
                if name in imported_names:
                    yield f"{module}:{line} {name}"
            called = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
            yield from (
                f"{module}:{node.lineno} {n}" for n in called if imported_names.get(n) in writers
            )


def test_nothing_registers_by_being_imported():
    """Each module has a table of its own, and one place joins them."""
    assert not list(registered({module_of(f): ast.parse(f.read_text()) for f in FILES}))
    assert not [module_of(f) for f in FILES if "noqa: F401" in f.read_text()]


def test_the_rule_for_registries_sees_what_is_wrong():
    table = "RULES = {}\ndef rule(name):\n def add(f):\n  RULES[name] = f\n return add"
    decorated = "from coda.one import rule\n@rule('a')\ndef f(): ..."
    entered = "from coda.one import RULES as theirs\ntheirs.update(a=1)"
    own = "from coda.one import RULES\nmine = []\nmine.append(1)\ndef f(): RULES['a'] = 1"
    sources = {"one": table, "two": decorated, "three": entered, "four": own}
    found = list(registered({name: ast.parse(text) for name, text in sources.items()}))
    assert found == ["two:2 rule", "three:2 theirs"]


def test_the_oracle_is_nobodys_base():
    """Backends share the values of a call with the reference backend, and not its executor."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                assert "ReferenceRun" not in map(ast.unparse, node.bases), module_of(file)


def test_kernels_are_computed_by_torch_only_where_no_code_defines_them():
    """Kinds without code, the reference backend, and a row-wise kernel without columns."""
    found = {
        module_of(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("kind.reference")
    }
    assert found == {"runtime.launcher", "runtime.reference", "kernels.rowwise.bind"}


def functions(tree, public=True):
    """(name, node, is a method) of each function; with `public`, of those that others can call."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not (public and node.name.startswith("_")):
            for one in node.body:
                if isinstance(one, ast.FunctionDef):
                    yield f"{node.name}.{one.name}", one, True
        elif isinstance(node, ast.FunctionDef):
            yield node.name, node, False


def positional(node, method):
    """The parameters that can be given by position, without self, and which have a default."""
    given = [*node.args.posonlyargs, *node.args.args]
    static = "staticmethod" in map(ast.unparse, node.decorator_list)
    plain = len(given) - len(node.args.defaults)
    values = [None] * plain + node.args.defaults
    return list(zip(given, values, strict=True))[int(method and not static) :]


# Their signatures are others': overrides of quack's classes, and operators with torch's schemas.
OVERRIDES = tuple(f"kernels.gemm.{n}" for n in ("ops", "ops_rows", "ops_sm100", "quack_target"))
SCHEMAS = ("custom_op", "register_fake", "_op.register_fake")


def is_ours(module, node):
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    return module not in OVERRIDES and not any(name in decorators for name in SCHEMAS)


def is_public(name):
    last = name.split(".")[-1]
    return not last.startswith("_") or last in ("__init__", "__call__")


def test_files_and_functions_are_short():
    long = [f"{f.relative_to(ROOT)}" for f in FILES if f.read_text().count("\n") > 450]
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_options_are_given_by_name():
    """At most six positional parameters, and no bool among them."""
    wrong = []
    for file in FILES:
        module = module_of(file)
        for name, node, method in functions(ast.parse(file.read_text())):
            given = positional(node, method)
            if not is_ours(module, node) or not is_public(name):
                continue
            flags = [
                arg.arg
                for arg, value in given
                if (isinstance(value, ast.Constant) and isinstance(value.value, bool))
                or (arg.annotation and ast.unparse(arg.annotation) == "bool")
            ]
            wrong += [f"{module}.{name}: {flag}" for flag in flags]
            if len(given) > 6:
                wrong.append(f"{module}.{name}: {len(given)} parameters")
    assert not wrong


def test_the_rules_for_options_see_what_is_wrong():
    tree = ast.parse("class A:\n def f(self, a, b: bool, c=True, *, d=False): ...")
    ((name, node, method),) = functions(tree)
    given = positional(node, method)
    assert (name, [a.arg for a, _ in given]) == ("A.f", ["a", "b", "c"])
    assert [v.value for _, v in given if v] == [True]


# These ask what a function or a monoid is, and never for one by its name. The frontend, the laws
# and the derivatives write mathematics, and name what they write.
PASSES = ("lowering.placement", "lowering.program", "kernels", "kernels.gemm", "kernels.rowwise")
PASSES += ("lowering", "runtime")


def test_no_pass_names_a_function_or_a_monoid():
    names = SCALARS.keys() | MONOIDS.keys()
    found = [
        f"{module_of(file)}:{node.lineno} {node.value!r}"
        for file in FILES
        if "." in module_of(file) and package_of(module_of(file)) in PASSES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert not found


TABLES = {"dict", "set", "list", "deque", "defaultdict", "OrderedDict", "Bounded", "lru_cache"}
TABLES |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet"}


def _cached(tree):
    """The names of a module's functions with a cache, and of its tables that start empty."""
    for node in ast.walk(tree):
        for one in getattr(node, "decorator_list", []):
            called = one.func if isinstance(one, ast.Call) else one
            if getattr(called, "attr", getattr(called, "id", "")) in ("cache", "lru_cache"):
                yield node.name
    for node in tree.body:
        value = getattr(node, "value", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or value is None:
            continue
        called = getattr(value, "func", None)
        called = getattr(called, "func", called)  # lru_cache(maxsize=...)(function)
        name = getattr(called, "attr", getattr(called, "id", ""))
        if ast.unparse(value) in ("{}", "[]") or (name in TABLES and not value.args):
            yield ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])


def test_every_cache_is_in_the_designs_table():
    trees = {module_of(f): ast.parse(f.read_text()) for f in FILES}
    found = {f"{m}.{n}" for m, t in trees.items() if not m.startswith("sim.") for n in _cached(t)}
    section = (ROOT / "docs/design.md").read_text().split("## Caches")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert found == {n for row in rows for n in re.findall("`([^`]*)`", row.split("|")[1])}


def _names(node):
    """The class names that the second argument of isinstance, or a type hint, has."""
    return {
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Name | ast.Attribute)
    }


def test_kinds_of_kernels_are_told_apart_in_their_folders_alone():
    """Elsewhere no isinstance on kernels or mainloops, and no comparison of a kernel's kind."""
    trees = {f: ast.parse(f.read_text()) for f in FILES}
    own = [f for f in FILES if (ROOT / "coda/kernels") in f.parents]
    mainloops = {
        c.name
        for f in own
        for c in trees[f].body
        if isinstance(c, ast.ClassDef)
        and (
            "OneNode" in {getattr(b, "id", "") for b in c.bases}
            or {"operands", "results", "points"}
            <= {m.name for m in c.body if isinstance(m, ast.FunctionDef)}
        )
    }
    assert mainloops == {"Attention", "Gradient", "Contractions", "Rows", "Operation"}
    kernels, values = (
        {"Kernel", "Mainloop", "OneNode", *mainloops},
        {"ATTENTION", "GEMM", "ROWWISE", "TORCH"},
    )
    wrong = []
    for file in set(FILES) - set(own):
        for node in ast.walk(trees[file]):
            found = set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                found = kernels & _names(node.args[1])
            elif isinstance(node, ast.Compare):
                found = values & _names(node)
                sides = [node.left, *node.comparators]
                about = [
                    s.value for s in sides if isinstance(s, ast.Attribute) and s.attr == "kind"
                ]
                found |= {"kernel", "draft", "k"} & set().union(*map(_names, about), set())
            elif isinstance(node, ast.MatchClass):
                found = kernels & _names(node.cls)
            wrong += [f"{file.relative_to(ROOT)}:{node.lineno} {n}" for n in sorted(found)]
    assert not wrong

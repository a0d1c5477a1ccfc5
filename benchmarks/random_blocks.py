"""Random blocks as source text: the same of a seed everywhere, through the public API alone.

`random_source(2)` is

    @coda.block
    def random_002(x0: coda.Tensor["M D"], y1: coda.Tensor["M D"], ...):
        t0 = coda.max(y1, keepdims=True)
        t1 = y1 - t0
        ...

A changed line here changes every block: corpora are compared that were written by one script.
"""

import random

UNARY = (
    *("coda.tanh({x})", "coda.sigmoid({x})", "coda.square({x})", "abs({x})", "coda.relu({x})"),
    *("coda.silu({x})", "coda.exp(-{x})", "coda.gelu({x})"),
)
BINARY = ("{x} + {y}", "{x} - {y}", "{x} * {y}", "coda.maximum({x}, {y})")
ROW = (
    "coda.mean({x}, keepdims=True)",
    "coda.sum({x} * {x}, keepdims=True)",
    "coda.rsqrt(coda.mean({x} * {x}, keepdims=True) + 1.0)",
    "coda.logsumexp({x}, keepdims=True)",
    "coda.max({x}, keepdims=True)",
)
LAYERS = (
    "coda.rms_norm({x}, eps=0.5)",
    "coda.layer_norm({x}, eps=0.5)",
    "coda.softmax({x})",
    "coda.log_softmax({x})",
)
HEADS = "{x}.reshape({x}.shape[0], {x}.shape[1] // 32, 32)"
BACK = ".reshape(*{x}.shape)"


class Author:
    """Writes the source of a random block, one operation after another."""

    def __init__(self, seed):
        self.random = random.Random(f"coda {seed}")
        self.inputs = {}
        self.lines = []
        self.pool = [(self.input("x", "M D"), "D"), (self.input("y", "M D"), "D")]

    def input(self, name, shape):
        """A new argument."""
        self.inputs[f"{name}{len(self.inputs)}"] = shape
        return f"{name}{len(self.inputs) - 1}"

    def pick(self, *widths):
        """A value of one of these numbers of columns, rather a late one."""
        fits = [v for v in self.pool if v[1] in widths] or self.pool[:1]
        return fits[max(self.random.randrange(len(fits)) for _ in range(3))]

    def step(self):
        """One more line: a value of earlier ones."""
        x, width = self.pick("D", "E")
        draw = self.random.choice
        kind = draw(self.KINDS)
        form, made = kind(self, width, draw)
        y = self.pick(width, "1")[0]
        name = f"t{len(self.lines)}"
        self.lines.append(f"    {name} = {form.format(x=x, y=y)}")
        self.pool.append((name, made))

    def unary(self, width, draw):
        return draw(UNARY), width

    def binary(self, width, draw):
        return draw(BINARY), width

    def row(self, _, draw):
        return draw(ROW), "1"

    def layer(self, width, draw):
        return draw(LAYERS), width

    def gain(self, width, _):
        return f"{{x}} * {self.input('w', width)}", width

    def bias(self, width, _):
        return f"{{x}} + {self.input('b', width)}", width

    def contract(self, width, draw):
        out = draw("DE")
        return f"{{x}} @ {self.input('w', f'{out} {width}')}.T", out

    def gated(self, width, draw):
        out = draw("DE")
        gate, up = (self.input("w", f"{out} {width}") for _ in range(2))
        return f"coda.swiglu({{x}} @ {gate}.T, {{x}} @ {up}.T)", out

    def rope(self, width, draw):
        cos, sin = (self.input(n, "M 16") for n in ("cos", "sin"))
        turned = f"coda.rope({HEADS}, {cos}, {sin}, interleaved={draw((True, False))})"
        return turned + BACK, width

    def head_norm(self, width, _):
        return f"coda.rms_norm({HEADS}, {self.input('w', '32')}, eps=0.5){BACK}", width

    def halves(self, width, _):
        half = "coda.split({x}, 2)"
        return f"coda.concat([{half}[1], coda.tanh({half}[0])])", width

    def whole(self, width, draw):
        flat = draw(ROW).format(x="{x}.reshape({x}.shape[0] * {x}.shape[1])")
        return f"{{x}} * coda.sigmoid({flat})", width

    KINDS = (
        *(unary, binary, binary, row, layer, gain, bias, contract, contract, gated),
        *(rope, head_norm, halves, whole),
    )


def random_source(seed):
    """The source of a random block of 3 to 12 operations, with one or two outputs."""
    author = Author(seed)
    for _ in range(author.random.randint(3, 12)):
        author.step()
    result = author.pool[-1][0]
    if author.random.random() < 0.4:
        result += f", {author.pick('D', 'E')[0]}"
    arguments = [f'    {n}: coda.Tensor["{shape}"],' for n, shape in author.inputs.items()]
    lines = ["import coda", "", "", "@coda.block", f"def random_{seed:03d}(", *arguments, "):"]
    return "\n".join([*lines, *author.lines, f"    return {result}", ""])

"""Declarations that Python has and a block does not: refused with the line, or taken.

docs/language.md: "Every error is a `coda.errors.CodaError`". A keyword-only argument is declared without
complaint by Python and answered by a bare `TypeError: f() takes 1 positional argument but 2 were given`
that names neither the line nor what would work. An argument with the default None traces as a required
tensor, whose omission is then refused at the call ("takes 2 tensors").

Right: a keyword-only argument is an argument (named in the call), or a CodaError that says so; a default
None leaves the argument out (another trace), or a CodaError at the declaration.
"""

import sys

import torch

import coda
from coda.errors import CodaError

wrong = 0
x, b = torch.randn(4, 8), torch.randn(8)


def named(x: coda.Tensor["M D"], *, b: coda.Tensor["D"]):
    return x + b


def optional(x: coda.Tensor["M D"], b: coda.Tensor["D"] = None):
    return x if b is None else x + b


try:
    found = coda.block(named)(x, b=b)
    wrong += not torch.allclose(found, x + b)
except CodaError as error:
    print(f"keyword-only: refused: {str(error).splitlines()[0]}")
except TypeError as error:
    wrong += 1
    print(f"keyword-only: TypeError: {error}  WRONG")

try:
    block = coda.block(optional)
except CodaError as error:
    print(f"default None: refused at its declaration: {str(error).splitlines()[0]}")
else:
    try:
        wrong += not torch.equal(block(x), x)
    except CodaError as error:
        wrong += 1
        print(
            f"default None: declared, but its omission is refused: {str(error).splitlines()[0]}  WRONG"
        )
sys.exit(wrong > 0)

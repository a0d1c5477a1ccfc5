"""The arguments and options that several commands of the command line take."""

from __future__ import annotations

from typing import Annotated

import typer

from coda.lowering.program.target import ONE_OF_ARCHS

Target = Annotated[str, typer.Argument(help="FILE.py:NAME of a block, or FILE.coda")]
BlockOrModel = Annotated[
    str,
    typer.Argument(
        help="FILE.py:NAME of a block, FILE.coda, or a model: package.module:function, or a "
        "directory or file of a transformers configuration"
    ),
]
Dims = Annotated[str, typer.Option(help="sizes, as in M=8192,D=4096")]
Arch = Annotated[str, typer.Option(help=f"{ONE_OF_ARCHS}, or a GPU's name")]
Type = Annotated[str, typer.Option(help="element type of arguments declared without one")]
Html = Annotated[str, typer.Option("--html", help="write one page of HTML to this file")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Backward = Annotated[bool, typer.Option("--backward", help="of training: forward and backward")]
Memory = Annotated[str, typer.Option(help="what training saves: min, balanced or speed")]
Wanted = Annotated[
    str, typer.Option(help="arguments to differentiate, as in x,w; else all floats but constants")
]
Inputs = Annotated[str, typer.Option(help="a .safetensors or .npz file of arguments")]
Seed = Annotated[int, typer.Option(help="of random arguments and schedules")]
Frozen = Annotated[bool, typer.Option(help="weights keep their values (inference)")]

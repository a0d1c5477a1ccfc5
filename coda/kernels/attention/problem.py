"""The key of one compilation of flash-attention, and the widths that it takes; tables as data.

A problem has no sizes but those that its code depends on: the widths of heads, how many heads of
queries share one of keys, and whether scores are masked by a band lo ≤ j - i ≤ hi.
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "4.0.0b36"  # of flash-attn-4: its classes' arguments are no interface that it keeps


@dataclass(frozen=True)
class Band:
    """A mask lo ≤ j - i ≤ hi; the ends are arguments of each launch.

    Attributes:
        lower, upper: whether there is such an end.
        diagonal: whether the band is exactly j ≤ i + T - S, which has a schedule of its own.
    """

    lower: bool = False
    upper: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class Forward:
    """A forward kernel.

    Attributes:
        arch: that it is compiled for.
        tensor_memory: whether the arch has tensor memory, and so kernels of Blackwell.
        dtype: the element type of q, k, v and o: "bf16" or "f16".
        width, width_v: the columns of heads of q and k, and of v and o.
        sharing: how many heads of queries read one head of keys.
        band: the mask.
        lse: whether the logsumexp of each row is written.
        scores: the module of the function of one score (`scores.ScoreFunction.text`); "" if there
            is none.
        captured: (element type, number of axes) of each tensor that the function reads.
        numbers: how many sizes it takes.
    """

    arch: str
    tensor_memory: bool
    dtype: str
    width: int
    width_v: int
    sharing: int = 1
    band: Band = Band()
    lse: bool = False
    scores: str = ""
    captured: tuple[tuple[str, int], ...] = ()
    numbers: int = 0


@dataclass(frozen=True)
class ScoreTile:
    """A tile of scores: `rows` queries by `columns` keys.

    Attributes:
        rows, columns: its size.
        p_in_registers: whether P is multiplied from registers (sm_90a).
    """

    rows: int
    columns: int
    p_in_registers: bool = True


# (widths up to, tile, tile of a band), as flash-attention measured them on an H100.
HOPPER_TILES: tuple[tuple[int, ScoreTile, ScoreTile], ...] = (
    (64, ScoreTile(192, 128), ScoreTile(192, 128)),
    (96, ScoreTile(192, 144, False), ScoreTile(192, 128, False)),
    (128, ScoreTile(128, 128), ScoreTile(128, 128)),
    (192, ScoreTile(128, 112), ScoreTile(128, 96)),
    (256, ScoreTile(128, 80), ScoreTile(128, 64)),
)
# Of widths 129 to 192 with values of up to 128, without a band.
NARROW_VALUES = ScoreTile(128, 128)
BLACKWELL_TILE = ScoreTile(128, 128)
# Pairs of widths beyond 128 that have kernels on sm_100a.
BLACKWELL_WIDE = frozenset({(192, 128), (256, 256)})
WIDEST = {False: 256, True: 128}  # by tensor memory


@dataclass(frozen=True)
class BackwardTile:
    """How the main kernel of a backward computes a tile of scores: `rows` queries, `columns` keys.

    Attributes:
        rows, columns: its size.
        stages_q, stages_do, stages_ds: the depths of its pipelines (sm_90a).
        scores_transposed, keys_transposed: whether the products that give scores, and dk and dv,
            are computed transposed (sm_90a).
        atoms_keys, atoms_queries: how many warpgroups share the rows of dk and dv, and of dq.
        dq_by_one: whether one warpgroup alone computes dq.
        pairs: whether two CTAs multiply together (sm_100a).
    """

    rows: int
    columns: int
    stages_q: int = 2
    stages_do: int = 2
    stages_ds: int = 2
    scores_transposed: bool = True
    keys_transposed: bool = False
    atoms_keys: int = 2
    atoms_queries: int = 1
    dq_by_one: bool = False
    pairs: bool = False


# (widths of q, k and v up to, tile), by the wider of them, since memory has to fit both.
HOPPER_BACKWARD: tuple[tuple[int, BackwardTile], ...] = (
    (64, BackwardTile(128, 128, atoms_queries=2)),
    (96, BackwardTile(64, 128, dq_by_one=True)),
    (128, BackwardTile(64, 128)),
    (192, BackwardTile(64, 96, 2, 1, 1, False, True)),
    (256, BackwardTile(64, 48, 2, 1, 1, False, True, 1)),
)
# With a function of scores, which keeps them in registers, narrower heads have this width's tile.
OF_FUNCTIONS = 128
# Of widths 129 to 192 with values of up to 128.
NARROW_VALUES_BACKWARD = BackwardTile(64, 96, 2, 2, 1, False, True)


Shape3 = tuple[int, int, int]


def _up(count: int, to: int) -> int:
    """The next multiple."""
    return -(-count // to) * to


@dataclass(frozen=True)
class Backward:
    """The kernels of a backward.

    Attributes:
        forward: the kernel whose results it differentiates.
        of_lse: whether the logsumexp of each row has a cotangent too.
        slope: the module of the derivative of the function of one score; "" if there is none.
    """

    forward: Forward
    of_lse: bool = False
    slope: str = ""

    @property
    def tile(self) -> BackwardTile:
        """The tile of its main kernel."""
        one = self.forward
        if one.tensor_memory:
            wide = one.width == 256
            return BackwardTile(128, 64 if wide else 128, atoms_keys=1, pairs=one.width >= 128)
        if 128 < one.width <= 192 and one.width_v <= 128:
            return NARROW_VALUES_BACKWARD
        least = OF_FUNCTIONS if one.scores else 0
        widest = max(one.width, one.width_v, least)
        return next(tile for width, tile in HOPPER_BACKWARD if widest <= width)

    @property
    def multiple(self) -> int:
        """The columns of heads in the float32 sums are a multiple of it, as in the main kernel."""
        hopper = 64 if self.tile.keys_transposed else 16
        return 32 if self.forward.tensor_memory else hopper

    @property
    def summed(self) -> tuple[str, ...]:
        """Which gradients are added up in float32, and then rounded."""
        return ("dq", "dk", "dv") if self.forward.sharing > 1 else ("dq",)

    def scratch(self, batch: int, groups: int, rows: tuple[int, int]) -> dict[str, Shape3]:
        """The shapes of the float32 tensors that its kernels pass to each other.

        Args:
            batch, groups: the number of sequences, and of heads of keys.
            rows: the numbers of queries and keys.
        """
        one, tile, heads = self.forward, self.tile, groups * self.forward.sharing
        queries = _up(rows[0], tile.rows)
        keys = _up(rows[1], tile.columns * (2 if tile.pairs else 1))
        width, width_v = (_up(w, self.multiple) for w in (one.width, one.width_v))
        found = {name: (batch, heads, queries) for name in ("delta", "lse_log2")}
        elements = {"dq": queries * width, "dk": keys * width, "dv": keys * width_v}
        count = {"dq": heads, "dk": groups, "dv": groups}
        return found | {of: (batch, count[of], elements[of]) for of in self.summed}


def why_not_widths(width: int, width_v: int, *, tensor_memory: bool) -> str:
    """The reason why no kernel, with tensor memory or without, has such heads; "" if one has."""
    if width % 8 or width_v % 8:
        return f"heads of {width} and {width_v} columns: a kernel's are multiples of 8"
    if tensor_memory and (width, width_v) in BLACKWELL_WIDE:
        return ""
    if min(width, width_v) < 8 or max(width, width_v) > WIDEST[tensor_memory]:
        gpu = "Blackwell" if tensor_memory else "Hopper"
        return f"no kernel of {gpu} has heads of {width} and {width_v} columns"
    return ""


def tile_of(problem: Forward) -> ScoreTile:
    """The tile of a problem whose widths have a kernel."""
    if problem.tensor_memory:
        return BLACKWELL_TILE
    width, band = problem.width, problem.band
    if 128 < width <= 192 and problem.width_v <= 128 and not (band.lower or band.upper):
        return NARROW_VALUES
    masked = band.lower or band.upper or band.diagonal
    _, plain, within_band = next(row for row in HOPPER_TILES if width <= row[0])
    return within_band if masked else plain

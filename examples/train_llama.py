"""A small Llama that learns a page of a book: coda's blocks between torch's attention cores.

    python examples/train_llama.py [--steps 200] [--bf16] [--torch]

Tokens are bytes. Everything but the embedding and the attention core is a block: what lies between
two attention cores is one of them, its backward derived. `--torch` trains the same model op by op,
from the same start on the same batches, so that the losses can be laid side by side.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import coda

TEXT = Path(__file__).with_name("alice.txt")
BATCH, LENGTH, LAYERS, HEADS, WIDTH, DIM, HIDDEN, WORDS = 8, 64, 2, 2, 32, 64, 192, 256
EPS = 1e-5


def heads(h, w_q, w_k, w_v, cos, sin):
    c, s = cos.cast(h.dtype), sin.cast(h.dtype)
    q = coda.rope((h @ w_q.T).reshape("M (H d) -> M H d"), c, s)
    k = coda.rope((h @ w_k.T).reshape("M (H d) -> M H d"), c, s)
    return {"q": q, "k": k, "v": (h @ w_v.T).reshape("M (H d) -> M H d")}


def feed_forward(attention, x, w_out, norm, w_gate, w_up, w_down):
    x = x + attention @ w_out.T
    h = coda.rms_norm(x, norm, eps=EPS)
    return x + coda.swiglu(h @ w_gate.T, h @ w_up.T) @ w_down.T


@coda.block
def before(
    x: coda.Tensor["M D"],
    norm: coda.Tensor["D"],
    w_q: coda.Tensor["(H d) D"],
    w_k: coda.Tensor["(H d) D"],
    w_v: coda.Tensor["(H d) D"],
    cos: coda.Constant["M d/2", coda.f32],
    sin: coda.Constant["M d/2", coda.f32],
):
    return heads(coda.rms_norm(x, norm, eps=EPS), w_q, w_k, w_v, cos, sin)


@coda.block
def between(
    attention: coda.Tensor["M (H d)"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D (H d)"],
    norm: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
    next_norm: coda.Tensor["D"],
    w_q: coda.Tensor["(H d) D"],
    w_k: coda.Tensor["(H d) D"],
    w_v: coda.Tensor["(H d) D"],
    cos: coda.Constant["M d/2", coda.f32],
    sin: coda.Constant["M d/2", coda.f32],
):
    x = feed_forward(attention, x, w_out, norm, w_gate, w_up, w_down)
    h = coda.rms_norm(x, next_norm, eps=EPS)
    return {"x": x, **heads(h, w_q, w_k, w_v, cos, sin)}


@coda.block
def after(
    attention: coda.Tensor["M (H d)"],
    x: coda.Tensor["M D"],
    w_out: coda.Tensor["D (H d)"],
    norm: coda.Tensor["D"],
    w_gate: coda.Tensor["F D"],
    w_up: coda.Tensor["F D"],
    w_down: coda.Tensor["D F"],
    last_norm: coda.Tensor["D"],
    w_head: coda.Tensor["V D"],
    target: coda.Tensor["M", coda.i64],
):
    x = feed_forward(attention, x, w_out, norm, w_gate, w_up, w_down)
    h = coda.rms_norm(x, last_norm, eps=EPS)
    logits = (h @ w_head.T).cast(coda.f32)
    return coda.cross_entropy(logits, target, reduction="none")


class Llama(nn.Module):
    """The model. `forward` takes tokens [B, S + 1] and gives the mean loss of the last S."""

    def __init__(self, dim: int = DIM, hidden: int = HIDDEN, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = weight(WORDS, dim, scale=1.0)
        self.first = nn.ParameterList([gain(dim), *(weight(dim, dim) for _ in range(3))])
        self.mlps = nn.ModuleList(
            nn.ParameterList(
                [
                    weight(dim, dim),
                    gain(dim),
                    weight(hidden, dim),
                    weight(hidden, dim),
                    weight(dim, hidden),
                ]
            )
            for _ in range(layers)
        )
        self.nexts = nn.ModuleList(
            nn.ParameterList([gain(dim), *(weight(dim, dim) for _ in range(3))])
            for _ in range(layers - 1)
        )
        self.last = nn.ParameterList([gain(dim), weight(WORDS, dim)])
        self.heads = dim // WIDTH
        for layer in (self.first, *self.nexts):
            coda.share_weights(*layer[1:])  # q, k and v are read as one matrix, and not copied
        for mlp in self.mlps:
            coda.share_weights(*mlp[2:4])  # so are gate and up

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        tables = rotations(batch, length)
        dims = {"H": self.heads, "d": WIDTH}
        x = functional.embedding(tokens[:, :-1].reshape(-1), self.embedding)
        found = before(x, *self.first, *tables, dims=dims)
        for mlp, following in zip(self.mlps, self.nexts, strict=False):
            o = attend(found["q"], found["k"], found["v"], batch)
            found = between(o, x, *mlp, *following, *tables, dims=dims)
            x = found["x"]
        o = attend(found["q"], found["k"], found["v"], batch)
        targets = tokens[:, 1:].reshape(-1)
        return after(o, x, *self.mlps[-1], *self.last, targets, dims=dims).mean()


class TorchLlama(Llama):
    """The same model, op by op in torch."""

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        tables = rotations(batch, length)
        x = functional.embedding(tokens[:, :-1].reshape(-1), self.embedding)
        norm, *qkv = self.first
        for mlp, following in zip(self.mlps, [*self.nexts, None], strict=True):
            q, k, v = self.project(x, norm, qkv, tables)
            w_out, gain, w_gate, w_up, w_down = mlp
            x = x + attend(q, k, v, batch) @ w_out.T
            h = functional.rms_norm(x, gain.shape, gain, EPS)
            x = x + (functional.silu(h @ w_gate.T) * (h @ w_up.T)) @ w_down.T
            norm, *qkv = following or (norm,)
        norm, w_head = self.last
        h = functional.rms_norm(x, norm.shape, norm, EPS)
        return functional.cross_entropy((h @ w_head.T).float(), tokens[:, 1:].reshape(-1))

    def project(
        self, x: Tensor, norm: Tensor, weights: list[Tensor], tables: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        h = functional.rms_norm(x, norm.shape, norm, EPS)
        q, k, v = ((h @ w.T).reshape(-1, self.heads, WIDTH) for w in weights)
        return [rotate(q, *tables), rotate(k, *tables), v]


def weight(rows: int, columns: int, scale: float | None = None) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * (scale or columns**-0.5))


def gain(dim: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(dim))


def rotations(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, one row for each token of the batch."""
    frequencies = 10000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos().repeat(batch, 1), angles.sin().repeat(batch, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """Causal attention of [B·S, H, d]: [B·S, H·d]."""
    parts = [x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v)]
    out = functional.scaled_dot_product_attention(*parts, is_causal=True)
    return out.transpose(1, 2).reshape(q.shape[0], -1)


def batches(steps: int, batch: int = BATCH, length: int = LENGTH) -> Iterator[Tensor]:
    """Random pieces of the text, [B, S + 1], the same ones in each run."""
    text = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[i : i + length + 1] for i in starts.tolist()])


def train(model: nn.Module, data: Iterator[Tensor], bf16: bool = False) -> Iterator[float]:
    """The losses of AdamW; with `bf16` under autocast, with parameters in float32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for tokens in data:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bf16", action="store_true", help="under torch.autocast")
    parser.add_argument("--torch", action="store_true", help="the same model op by op")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = TorchLlama() if options.torch else Llama()
    for step, loss in enumerate(train(model, batches(options.steps), options.bf16), 1):
        if step % 10 == 0 or step == 1:
            print(f"step {step:4}  loss {loss:.4f}")


if __name__ == "__main__":
    main()

"""Attention, embeddings and dropout as ONNX, output and every gradient against PyTorch's autograd in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from device_tests.export.helpers import Probe, check, lowered, session
from edgelocal.exporters.lowering import UnsupportedOperatorError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class SelfAttention(nn.Module):
    """MultiheadAttention of a sequence with itself."""

    def __init__(self, dropout: float = 0.0, mask: Tensor | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 8) -> (N, T, 8)."""
        out: Tensor = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]
        return out


class Scaled(nn.Module):
    """scaled_dot_product_attention on three projections."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 18)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 6) -> (N, T, 6)."""
        q, k, v = self.projection(x).chunk(3, -1)
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
ATTENTION: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "multihead": (SelfAttention(), (5, 8)),
    "multihead, causal mask": (SelfAttention(mask=CAUSAL), (5, 8)),
    "multihead, dropout": (SelfAttention(0.3), (5, 8)),
    "scaled dot product": (Scaled(), (5, 6)),
    "scaled dot product, causal": (Scaled(is_causal=True), (5, 6)),
    "scaled dot product, scale": (Scaled(scale=0.3), (5, 6)),
    "scaled dot product, dropout": (Scaled(dropout_p=0.25), (5, 6)),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), (5, 8)),
    "encoder layer, pre-norm, gelu": (
        nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True),
        (5, 8),
    ),
    "encoder layer, dropout": (nn.TransformerEncoderLayer(8, 2, 12, 0.2, batch_first=True), (5, 8)),
}


@pytest.mark.parametrize(("module", "shape"), ATTENTION.values(), ids=list(ATTENTION))
def test_attention(module: nn.Module, shape: tuple[int, ...]) -> None:
    check(module, shape)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}], ids=["plain", "padding"])
def test_embedding(options: dict[str, int]) -> None:
    check(nn.Embedding(9, 4, **options), (6,), dtype=torch.int64, draw=lambda shape: torch.randint(0, 9, shape))


def test_embedding_with_positions() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4, 0), nn.Embedding(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.words(x) + self.places(torch.arange(x.shape[1]))
            return out

    check(Tokens(), (6,), dtype=torch.int64, draw=lambda shape: torch.randint(0, 9, shape))


def test_embedding_that_scales_by_frequency_is_refused() -> None:
    probe = Probe(nn.Embedding(9, 4, scale_grad_by_freq=True), (6,), (6, 4), floating=False)
    with pytest.raises(UnsupportedOperatorError, match="scale_grad_by_freq"):
        lowered(probe, (6,), torch.int64)


class StochasticDepth(nn.Module):
    """The branch of a sample is dropped as a whole."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.branch = nn.Linear(5, 5)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 5) -> (N, T, 5)."""
        chosen = torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(self.keep)
        out: Tensor = x + self.branch(x) * chosen / self.keep
        return out


DROPS: dict[str, nn.Module] = {
    "dropout": nn.Dropout(0.3),
    "dropout of none": nn.Dropout(0.0),
    "twice": nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 5), nn.Dropout(0.6)),
    "channels": nn.Dropout1d(0.4),
    "alpha": nn.AlphaDropout(0.2),
    "stochastic depth": StochasticDepth(0.7),
    "in inference": nn.Dropout(0.3).eval(),
}


@pytest.mark.parametrize("module", DROPS.values(), ids=list(DROPS))
def test_dropout_with_given_masks(module: nn.Module) -> None:
    check(module, (4, 5))


def test_dropout_is_the_mask_times_the_scale() -> None:
    """Without PyTorch's random functions at all: y = x mask / (1 - p), and dx = dy mask / (1 - p)."""
    probe = Probe(nn.Dropout(0.25), (6,), (6,), floating=True)
    graph = lowered(probe, (6,), torch.float32)
    state = {name: tensor.detach().numpy() for name, tensor in probe.state_dict().items()}
    ((name, shape, keep),) = graph.masks
    assert (name, shape[1:], keep) == ("rand/0", (6,), 0.75)
    rng = np.random.default_rng(1)
    x, mask = rng.standard_normal((4, 6), dtype=np.float32), rng.random((4, 6)) < 0.75
    feeds = {"x": x, name: mask, **{n: state[n] for n in graph.state}}
    found = dict(zip(graph.outputs, session(graph.model).run(None, feeds), strict=True))
    out = (x * state["scale"] + state["shift"]) * mask / 0.75
    np.testing.assert_allclose(found["out"], out, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["grad/shift"][0], ((out + state["target"]) * mask / 0.75).sum(0), rtol=1e-5)


def test_dropout_in_inference_has_no_mask() -> None:
    probe = Probe(nn.Dropout(0.3).eval(), (6,), (6,), floating=True)
    assert lowered(probe, (6,), torch.float32).masks == []

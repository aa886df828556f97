"""Layers beyond the standard ones, and which modules can be trained as functions.

Everything here takes any leading axes, is written with plain operations, can be differentiated twice and
can be batched over workers by `torch.vmap`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Sum of two branches, ``body(x) + shortcut(x)``.

    Parameters
    ----------
    body, shortcut : nn.Module
        Branches with outputs of equal shape; ``nn.Identity()`` for a plain skip.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ``body(x) + shortcut(x)``."""
        return self.body(x) + self.shortcut(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention, written with plain operations.

    ``softmax(Q K^T / sqrt(d)) V`` in each head with ``d = width / heads``; Q, K, V are the three thirds of one
    affine map, the joined heads pass through another. It takes any leading axes, ``[..., T, width]``, and
    can be differentiated twice and batched by `torch.vmap`.

    Parameters
    ----------
    width : int
        Size of a position's vector, a multiple of ``heads``.
    heads : int
        Number of heads.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores ``[..., T, T]`` that count; here all do."""
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., T, width]`` to ``[..., T, width]``."""
        # [..., T, 3 width] -> three of [..., heads, T, d]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        attention = self.mask((q @ k.mT) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.out((attention @ v).transpose(-3, -2).flatten(-2))


def encoder(layers: int, width: int, heads: int, mlp: int) -> nn.Sequential:
    """Make pre-norm blocks ``x <- x + attention(norm(x))``, ``x <- x + mlp(norm(x))`` and a final norm.

    Parameters
    ----------
    layers : int
        Number of blocks.
    width : int
        Size of a position's vector, a multiple of ``heads``.
    heads : int
        Number of attention heads; every position sees all.
    mlp : int
        Hidden width of a block's GELU network as a multiple of ``width``.

    Returns
    -------
    nn.Sequential
        Maps ``[..., T, width]`` to the same shape.
    """
    blocks: list[nn.Module] = []
    for _ in range(layers):
        attention = SelfAttention(width, heads)
        network = [nn.Linear(width, mlp * width), nn.GELU(), nn.Linear(mlp * width, width)]
        blocks += [
            Residual(nn.Sequential(nn.LayerNorm(width), attention), nn.Identity()),
            Residual(nn.Sequential(nn.LayerNorm(width), *network), nn.Identity()),
        ]
    return nn.Sequential(*blocks, nn.LayerNorm(width))


class CausalSelfAttention(SelfAttention):
    """`SelfAttention` in which position t sees positions 0..t: scores above the diagonal are ``-inf``."""

    def mask(self, scores: Tensor) -> Tensor:
        """Return the scores with ``-inf`` for later positions."""
        position = torch.arange(scores.shape[-1], device=scores.device)
        future = position > position.unsqueeze(-1)
        return scores.masked_fill(future, -torch.inf)


class Decoder(nn.Module):
    """Language model: embedding plus learned positions, a body, and one logit for every token.

    ``logits = body(E[tokens] + P[:T]) H^T`` with ``H = E`` if the embedding is tied.

    Parameters
    ----------
    vocabulary : int
        Number V of tokens.
    context : int
        Greatest length of a sequence.
    width : int
        Size of a position's vector.
    body : nn.Module
        Maps ``[..., T, width]`` to the same shape.
    tied : bool
        Whether embedding and output share one matrix.
    """

    def __init__(self, vocabulary: int, context: int, width: int, body: nn.Module, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.body = body
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[..., T]`` to logits ``[..., T, V]``."""
        x = self.body(self.embedding(tokens) + self.position.weight[: tokens.shape[-1]])
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)


def check_functional(module: nn.Module) -> None:
    """Refuse a model that is more than a function of its parameters and its input.

    Running statistics and other floating-point buffers would be neither trained nor averaged; batch
    normalisation and dropout make the output of a sample depend on other samples or on a generator.

    Parameters
    ----------
    module : nn.Module
        The model.

    Raises
    ------
    ValueError
        If it has a layer with running statistics, batch normalisation, another floating-point buffer, or dropout.

    Examples
    --------
    >>> check_functional(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    Traceback (most recent call last):
    ValueError: layer '1' (BatchNorm2d) mixes samples and keeps running statistics; use nn.GroupNorm instead
    """
    for name, layer in module.named_modules():
        where = f"layer '{name}' ({type(layer).__name__})" if name else type(layer).__name__
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{where} mixes samples and keeps running statistics; use nn.GroupNorm instead")
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise ValueError(f"{where} keeps running statistics; use nn.GroupNorm instead")
        for buffer, value in layer.named_buffers(recurse=False):
            if value.is_floating_point() or value.is_complex():
                raise ValueError(
                    f"{where} has the floating-point buffer '{buffer}', which is neither trained nor averaged; "
                    "compute it in forward (or use nn.GroupNorm if it holds running statistics)"
                )
        if _dropout(layer) > 0:
            raise ValueError(f"{where} has active dropout, which needs a random generator; set it to 0")


def _dropout(layer: nn.Module) -> float:
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase):
        return layer.dropout
    return 0.0

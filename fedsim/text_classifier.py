"""A small transformer that reads a window of tokens and names its class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedsim import checks
from fedsim.layers import encoder


class LastToken(nn.Module):
    """Embedding plus learned positions, a body, and a linear map of the last position.

    Parameters
    ----------
    vocabulary : int
        Number V of tokens.
    context : int
        Length T of a sequence.
    width : int
        Size of a position's vector.
    body : nn.Module
        Maps ``[..., T, width]`` to the same shape.
    num_outputs : int
        Classes C.
    """

    def __init__(self, vocabulary: int, context: int, width: int, body: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.body = body
        self.head = nn.Linear(width, num_outputs)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[..., T]`` to ``[..., C]``."""
        x = self.body(self.embedding(tokens) + self.position.weight[: tokens.shape[-1]])
        return self.head(x[..., -1, :])


@dataclass(frozen=True)
class TextClassifier:
    """Transformer encoder for classes of text: tokens ``[B, T]`` to outputs ``[B, C]``.

    Pre-norm blocks ``x <- x + attention(norm(x))``, ``x <- x + mlp(norm(x))`` in which every position sees all, with
    a GELU network, learned positions, a final norm, and a linear map of the last position. No dropout.
    Embeddings and positions start from normal numbers with standard deviation 0.02.

    Parameters
    ----------
    vocabulary : int
        Number V of tokens; tokens are in 0..V-1.
    layers : int
        Number of blocks.
    width : int
        Size of a position's vector, a multiple of ``heads``.
    heads : int
        Number of attention heads.
    mlp : int
        Hidden width of a block's network as a multiple of ``width``.

    Raises
    ------
    ValueError
        If a number is below 1 or ``heads`` does not divide ``width``.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762; pre-norm: Xiong et al. 2020, arXiv 2002.04745.
    """

    vocabulary: int = 65
    layers: int = 2
    width: int = 64
    heads: int = 8
    mlp: int = 2

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "vocabulary", "layers", "width", "heads", "mlp")
        if self.width % self.heads:
            raise ValueError(f"TextClassifier: heads = {self.heads} must divide width = {self.width}")

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, T] -> [B, num_outputs]``."""
        if len(input_shape) != 1:
            raise ValueError(
                f"TextClassifier: input_shape = {input_shape} must be (context,), samples of tokens"
            )
        body = encoder(self.layers, self.width, self.heads, self.mlp)
        return LastToken(self.vocabulary, input_shape[0], self.width, body, num_outputs)

"""GPT-Neo as the library ``transformers`` has it, for comparisons with published runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedsim import checks


class Logits(nn.Module):
    """A language model of ``transformers`` as a map of tokens ``[B, T]`` to logits ``[B, T, V]``.

    Parameters
    ----------
    inner : nn.Module
        The language model.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, T]`` to logits ``[B, T, V]``."""
        return self.inner(tokens).logits


@dataclass(frozen=True)
class GPTNeo:
    """GPT-Neo with random parameters, from ``transformers``: tokens ``[B, T]`` to next-token logits ``[B, T, V]``.

    A causal transformer with learned positions and tied embeddings, whose blocks attend in turn to all earlier
    positions and to the last ``window``. No dropout. The context T is the length of the samples, and V is that
    of the data. It has no form with a worker axis: plans ``loop`` and ``vmap``. The default has 8 million
    parameters with the 50,257 tokens of GPT-2 and a context of 300. Needs the extra ``fedsim[transformers]``.

    Parameters
    ----------
    layers : int
        Number of blocks.
    width : int
        Size of a position's vector, a multiple of ``heads``.
    heads : int
        Number of attention heads.
    window : int
        Positions that every second block attends to.

    Raises
    ------
    ValueError
        If a number is below 1 or ``heads`` does not divide ``width``.

    References
    ----------
    Black, Gao, Wang, Leahy, Biderman (2021), GPT-Neo: Large scale autoregressive language modeling with
    Mesh-Tensorflow, doi:10.5281/zenodo.5297715.
    """

    layers: int = 8
    width: int = 128
    heads: int = 8
    window: int = 256

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "layers", "width", "heads", "window")
        if self.width % self.heads:
            raise ValueError(f"GPTNeo: heads = {self.heads} must divide width = {self.width}")

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, T] -> [B, T, num_outputs]``."""
        if len(input_shape) != 1:
            raise ValueError(f"GPTNeo: input_shape = {input_shape} must be (context,), samples of tokens")
        config, model = _transformers()
        pairs, rest = divmod(self.layers, 2)
        kinds = [[["global", "local"], pairs]] * (pairs > 0) + [[["global"], 1]] * rest
        return Logits(
            model(
                config(
                    vocab_size=num_outputs, max_position_embeddings=input_shape[0], hidden_size=self.width,
                    num_layers=self.layers, num_heads=self.heads, attention_types=kinds, window_size=self.window,
                    resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, use_cache=False,
                    bos_token_id=0, eos_token_id=0, attn_implementation="eager",
                )
            )
        )  # fmt: skip


def _transformers() -> tuple[Any, Any]:
    """Import configuration and model, or say in one line why that cannot be."""
    try:
        from transformers import GPTNeoConfig, GPTNeoForCausalLM
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise ValueError("GPTNeo needs transformers: install the extra fedsim[transformers]") from None
        raise ValueError(f"GPTNeo: transformers cannot be imported: {_cause(error)}") from error
    return GPTNeoConfig, GPTNeoForCausalLM


def _cause(error: BaseException) -> str:
    """Name the first error of a chain, in one line."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return " ".join(str(error).split())

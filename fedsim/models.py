"""Models: frozen descriptions that build a module, and the parameters they start from.

A model is used as a function of its parameters, ``torch.func.functional_call(module, theta, x)``, for many
workers at once. The module is a template: its own parameters are never read. A specification is any
frozen dataclass with a method ``build(input_shape, num_outputs)`` that returns such a module; the ones here
are chains (`torch.nn.Sequential`) of standard layers and `Residual`, so that an engine can also run them
layer by layer. A module of your own may contain anything that is a function of parameters and input alone:
no running statistics, no dropout (`check_functional` tells).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim import checks
from fedsim.layers import CausalSelfAttention, Decoder, Residual, check_functional
from fedsim.random import key
from fedsim.tree import Tree

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class ModelSpec(Protocol):
    """Description of a model: any frozen dataclass with this method."""

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module for samples of ``input_shape`` (without the batch axis) and ``num_outputs`` outputs."""
        ...


def _check_sizes(name: str, input_shape: tuple[int, ...], num_outputs: int) -> None:
    if not input_shape or min(input_shape) < 1:
        raise ValueError(f"{name}: input_shape = {input_shape} must be a tuple of sizes >= 1")
    if num_outputs < 1:
        raise ValueError(f"{name}: num_outputs = {num_outputs} must be >= 1")


def _check_image(
    name: str, input_shape: tuple[int, ...], num_outputs: int, side: int
) -> tuple[int, int, int]:
    _check_sizes(name, input_shape, num_outputs)
    if len(input_shape) != 3 or min(input_shape[1:]) < side:
        raise ValueError(
            f"{name}: input_shape = {input_shape} must be (channels, height, width), both sides >= {side}"
        )
    return input_shape[0], input_shape[1], input_shape[2]


def _check_widths(name: str, field: str, widths: tuple[int, ...]) -> None:
    if not (isinstance(widths, tuple) and all(isinstance(w, int) and w >= 1 for w in widths)):
        raise ValueError(f"{name}: {field} = {widths!r} must be a tuple of integers >= 1")


@dataclass(frozen=True)
class Linear:
    """Linear map of the flattened input, ``z = A x + b``: linear, logistic and softmax regression.

    Parameters
    ----------
    bias : bool
        Whether there is ``b``; without it every decision boundary passes through the origin.
    zero_init : bool
        Start from ``A = 0, b = 0`` instead of PyTorch's uniform numbers.

    Examples
    --------
    >>> Linear(bias=False).build((3,), 1)
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=3, out_features=1, bias=False)
    )
    """

    bias: bool = True
    zero_init: bool = False

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, *input_shape] -> [B, num_outputs]``."""
        _check_sizes("Linear", input_shape, num_outputs)
        linear = nn.Linear(math.prod(input_shape), num_outputs, bias=self.bias)
        if self.zero_init:
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
        return nn.Sequential(nn.Flatten(), linear)


@dataclass(frozen=True)
class MLP:
    """Fully connected network on the flattened input: ``h <- activation(A h + b)`` a layer, then a linear map.

    Parameters
    ----------
    hidden : tuple of int
        Width of each hidden layer; ``()`` is the linear model.
    activation : str
        "relu", "tanh", "gelu", "silu" or "identity" (a deep linear network).
    bias : bool
        Whether layers have a bias; without, relu and identity networks are homogeneous in their parameters.
    init : str
        "torch": all uniform in ``+-1 / sqrt(in)``; "xavier": matrices uniform in ``+-sqrt(6 / (in + out))``, biases 0.

    Raises
    ------
    ValueError
        If a width is below 1, or the activation or initialisation is unknown.

    References
    ----------
    Glorot, Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.
    """

    hidden: tuple[int, ...] = (200,)
    activation: str = "relu"
    bias: bool = True
    init: str = "torch"

    def __post_init__(self) -> None:
        _check_widths("MLP", "hidden", self.hidden)
        checks.one_of(self, "activation", _ACTIVATIONS)
        checks.one_of(self, "init", ("torch", "xavier"))

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, *input_shape] -> [B, num_outputs]``."""
        _check_sizes("MLP", input_shape, num_outputs)
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = math.prod(input_shape)
        for width in self.hidden:
            layers += [nn.Linear(fan_in, width, bias=self.bias), _ACTIVATIONS[self.activation]()]
            fan_in = width
        module = nn.Sequential(*layers, nn.Linear(fan_in, num_outputs, bias=self.bias))
        if self.init == "xavier":
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
        return module


@dataclass(frozen=True)
class SmallCNN:
    """Convolutions 3x3 with padding 1, each followed by ReLU and 2x2 pooling, then a linear map.

    Parameters
    ----------
    channels : tuple of int
        Channels of each convolution; images need sides of at least ``2 ** len(channels)``.
    pool : str
        "max" or "average".

    Raises
    ------
    ValueError
        If there is no convolution, one has fewer than 1 channel, or the pooling is unknown.
    """

    channels: tuple[int, ...] = (16, 32)
    pool: str = "max"

    def __post_init__(self) -> None:
        _check_widths("SmallCNN", "channels", self.channels)
        if not self.channels:
            raise ValueError("SmallCNN: channels = () must name at least one convolution")
        checks.one_of(self, "pool", ("max", "average"))

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, channels, height, width] -> [B, num_outputs]``."""
        shrink = 2 ** len(self.channels)
        fan_in, height, width = _check_image("SmallCNN", input_shape, num_outputs, side=shrink)
        pool = nn.MaxPool2d if self.pool == "max" else nn.AvgPool2d
        layers: list[nn.Module] = []
        for fan_out in self.channels:
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), pool(2)]
            fan_in = fan_out
        features = fan_in * (height // shrink) * (width // shrink)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_outputs))


@dataclass(frozen=True)
class CNN7:
    """The seven-layer network of the elastic-averaging and leader-SGD papers, without its dropout.

    5x5x64, ReLU, pool 2; 5x5x128, ReLU, pool 2; 3x3x64, ReLU; linear 256 (no activation); linear. No
    convolution is padded. For 3x28x28 and 10 classes it has 351,946 parameters; sides must be >= 24.

    The papers put dropout 0.5 before the last layer. Here it is left out: all workers train in one
    batched call of a function of parameters and data, and a dropout mask would come from a random
    generator with a state, so that results would depend on how workers are grouped. Published
    accuracies were reached with dropout; expect differences.

    Parameters
    ----------
    dropout : float
        Must be 0; it is there to say so.

    Raises
    ------
    ValueError
        If ``dropout`` is not 0.

    References
    ----------
    Zhang, Choromanska, LeCun 2015, arXiv 1412.6651; Teng et al. 2019, arXiv 1905.10395.
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dropout != 0:
            raise ValueError(
                f"CNN7: dropout = {self.dropout} must be 0: workers are trained in one batched call, "
                "where a mask from a random generator would depend on how they are grouped"
            )

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, channels, height, width] -> [B, num_outputs]``."""
        channels, height, width = _check_image("CNN7", input_shape, num_outputs, side=24)

        def side(n: int) -> int:
            return ((n - 4) // 2 - 4) // 2 - 2

        return nn.Sequential(
            nn.Conv2d(channels, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side(height) * side(width), 256),
            nn.Linear(256, num_outputs),
        )


@dataclass(frozen=True)
class ResNet20:
    """Residual network of 20 layers for small images, with group instead of batch normalisation.

    A 3x3 convolution, then three stages of three blocks with ``width``, ``2 width`` and ``4 width`` channels,
    then the mean over positions and a linear map. A block is ``relu(body(x) + shortcut(x))`` with two
    3x3 convolutions. The first block of stages two and three has stride 2; there the shortcut is a 1x1
    convolution with normalisation (option B of the paper). Convolutions have no bias and start from He's
    normal numbers. For 3x32x32 and 10 classes it has 272,474 parameters.

    Parameters
    ----------
    groups : int
        Groups of each normalisation; divides ``width``.
    width : int
        Channels of the first stage.

    Raises
    ------
    ValueError
        If ``groups`` is below 1 or does not divide ``width``.

    References
    ----------
    He, Zhang, Ren, Sun 2015, arXiv 1512.03385; Wu, He 2018, arXiv 1803.08494.
    """

    groups: int = 8
    width: int = 16

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "groups", "width")
        if self.width % self.groups:
            raise ValueError(f"ResNet20: groups = {self.groups} must divide width = {self.width}")

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, channels, height, width] -> [B, num_outputs]``."""
        channels, _, _ = _check_image("ResNet20", input_shape, num_outputs, side=4)
        layers: list[nn.Module] = [*self._convolution(channels, self.width, 3, 1), nn.ReLU()]
        fan_in = self.width
        for stage in range(3):
            fan_out = self.width * 2**stage
            for _ in range(3):
                layers += self._block(fan_in, fan_out)
                fan_in = fan_out
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, num_outputs))

    def _convolution(self, fan_in: int, fan_out: int, size: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        return [convolution, nn.GroupNorm(self.groups, fan_out)]

    def _block(self, fan_in: int, fan_out: int) -> list[nn.Module]:
        stride = 1 if fan_in == fan_out else 2
        body = nn.Sequential(
            *self._convolution(fan_in, fan_out, 3, stride),
            nn.ReLU(),
            *self._convolution(fan_out, fan_out, 3, 1),
        )
        if stride == 1:
            return [Residual(body, nn.Identity()), nn.ReLU()]
        return [Residual(body, nn.Sequential(*self._convolution(fan_in, fan_out, 1, stride))), nn.ReLU()]


@dataclass(frozen=True)
class Transformer:
    """Decoder-only transformer for text: tokens ``[B, T]`` to next-token logits ``[B, T, V]``.

    Pre-norm blocks ``x <- x + attention(norm(x))``, ``x <- x + mlp(norm(x))`` with causal attention and
    a GELU network, learned positions, a final norm, no dropout. The context T is the length of the
    samples, ``input_shape = (T,)``, and V is ``num_outputs``. Embeddings start from normal numbers
    with standard deviation 0.02, so that tied logits start near 0 and the loss near ``log V``.

    Parameters
    ----------
    layers : int
        Number of blocks.
    width : int
        Size of a position's vector, a multiple of ``heads``.
    heads : int
        Number of attention heads.
    mlp : int
        Hidden width of a block's network as a multiple of ``width``.
    tied : bool
        Whether embedding and output share one matrix (one entry of the tree).

    Raises
    ------
    ValueError
        If a number is below 1 or ``heads`` does not divide ``width``.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762; pre-norm: Xiong et al. 2020, arXiv 2002.04745; tied embeddings:
    Press, Wolf 2016, arXiv 1608.05859.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    mlp: int = 4
    tied: bool = True

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "layers", "width", "heads", "mlp")
        if self.width % self.heads:
            raise ValueError(f"Transformer: heads = {self.heads} must divide width = {self.width}")

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Build the module ``[B, T] -> [B, T, num_outputs]``."""
        _check_sizes("Transformer", input_shape, num_outputs)
        if len(input_shape) != 1:
            raise ValueError(
                f"Transformer: input_shape = {input_shape} must be (context,), samples of tokens"
            )
        blocks = [part for _ in range(self.layers) for part in self._block()]
        body = nn.Sequential(*blocks, nn.LayerNorm(self.width))
        return Decoder(num_outputs, input_shape[0], self.width, body, self.tied)

    def _block(self) -> list[nn.Module]:
        attention = CausalSelfAttention(self.width, self.heads)
        inner = self.mlp * self.width
        network = [nn.Linear(self.width, inner), nn.GELU(), nn.Linear(inner, self.width)]
        return [
            Residual(nn.Sequential(nn.LayerNorm(self.width), attention), nn.Identity()),
            Residual(nn.Sequential(nn.LayerNorm(self.width), *network), nn.Identity()),
        ]


def initialise(
    spec: ModelSpec,
    input_shape: tuple[int, ...],
    num_outputs: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Tree]:
    """Build a model and draw its initial parameters, a function of the arguments alone.

    Numbers are drawn on the CPU in float32 and then converted, so that runs in different precision or on
    different devices start from the same point. PyTorch's global generators are left as they were.

    Parameters
    ----------
    spec : ModelSpec
        What to build.
    input_shape : tuple of int
        Shape of a sample, without the batch axis.
    num_outputs : int
        Outputs C, or the size V of the vocabulary.
    seed : int
        Seed of the run.
    dtype : torch.dtype
        Floating-point type of the parameters.

    Returns
    -------
    tuple of nn.Module and Tree
        The module, a template for `torch.func.functional_call`, and its parameters, leaves ``[*]``.

    Raises
    ------
    ValueError
        If a parameter is frozen, or the model is not a function of parameters and input
        (see `check_functional`).

    Examples
    --------
    >>> from fedsim.tree import num_parameters
    >>> module, theta = initialise(MLP(hidden=(200,)), (64,), 10, seed=0)
    >>> num_parameters(theta)
    15010
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it would also reseed the accelerators, which are not forked.
        torch.default_generator.manual_seed(key(seed, "model"))
        module = spec.build(input_shape, num_outputs).to(dtype)
    check_functional(module)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ValueError(f"parameter '{name}' is frozen; apply the frozen part to the data beforehand")
    return module, {name: p.detach().clone() for name, p in module.named_parameters()}


def check_output(module: nn.Module, params: Tree, x_example: Tensor, num_outputs: int, task: str) -> None:
    """Run a model on an example and refuse it if the output does not fit the task.

    Parameters
    ----------
    module : nn.Module
        The template.
    params : Tree
        Its parameters.
    x_example : Tensor
        A few samples, ``[B, *]``.
    num_outputs : int
        Outputs C the data asks for, or the size V of the vocabulary.
    task : str
        "classes" and "regression" ask for ``[B, C]``, "binary" for ``[B, 1]``, "tokens" for ``[B, T, V]``.

    Raises
    ------
    ValueError
        If the task is unknown or the output has another shape.
    """
    batch = x_example.shape[0]
    wanted = {
        "classes": (batch, num_outputs),
        "binary": (batch, 1),
        "regression": (batch, num_outputs),
        "tokens": (*x_example.shape[:2], num_outputs),
    }
    if task not in wanted:
        raise ValueError(f"task = {task!r} must be one of {', '.join(wanted)}")
    with torch.no_grad():
        output = functional_call(module, params, (x_example,))
    if tuple(output.shape) != wanted[task]:
        raise ValueError(
            f"the model gives outputs of shape {tuple(output.shape)} for inputs of shape "
            f"{tuple(x_example.shape)}; the task {task!r} needs {wanted[task]}"
        )

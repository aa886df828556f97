"""Layers with a worker axis: the forward pass of many workers as a few batched calls.

`stack_module` turns a module made of known layers into a function of a stack of parameters,
``(rows: leaves [W, *], x: [W, B, *]) -> [W, B, *]``. `Chain` is the special case of affine maps and
elementwise activations with the backward pass written out, which needs neither an autograd graph nor,
for plain gradient descent, memory for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.layers import CausalSelfAttention, Decoder, Residual, SelfAttention
from fedsim.objectives import Objective
from fedsim.tree import Stack, Tree

Apply = Callable[[Stack, Tensor], Tensor]


class Unsupported(Exception):
    """A layer has no form with a worker axis; the generic ``vmap`` plan takes the model."""


def stack_module(module: nn.Module, prefix: str = "") -> Apply:
    """Build the forward pass of many workers at once.

    Parameters
    ----------
    module : nn.Module
        Sequential chains and `Residual` sums of the layers in the table below, or a `Decoder` around one.
    prefix : str
        Prefix of its parameters' names.

    Returns
    -------
    callable
        ``(rows, x) -> output``; ``rows`` has leaves ``[W, *]``, ``x`` is ``[W, B, *]``.

    Raises
    ------
    Unsupported
        If the module contains any other layer.
    """
    _check_shared(module, prefix)
    if type(module) is nn.Sequential:
        parts = [stack_module(child, f"{prefix}{name}.") for name, child in _children(module)]

        def sequential(rows: Stack, x: Tensor) -> Tensor:
            for part in parts:
                x = part(rows, x)
            return x

        return sequential
    if type(module) is Residual:
        body = stack_module(module.body, f"{prefix}body.")
        shortcut = stack_module(module.shortcut, f"{prefix}shortcut.")
        return lambda rows, x: body(rows, x) + shortcut(rows, x)
    if type(module) is Decoder:
        return _decoder(module, prefix)
    if type(module) is SelfAttention or type(module) is CausalSelfAttention:
        return _attention(module, prefix)
    make = _LAYERS.get(type(module))
    if make is None or not {n for n, _ in module.named_parameters()} <= {"weight", "bias"}:
        raise Unsupported(f"{prefix.rstrip('.') or 'model'}: {type(module).__name__}")
    return make(module, prefix)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the direct children; one that is used twice is there twice, unlike in ``named_children``."""
    every = module.named_modules(remove_duplicate=False)
    return [(name, child) for name, child in every if name and "." not in name]


def _check_shared(module: nn.Module, prefix: str = "") -> None:
    """Refuse parameters with two names: the tree knows only the first."""
    known = {name for name, _ in module.named_parameters()}
    for name, _ in module.named_parameters(remove_duplicate=False):
        if name not in known:
            raise Unsupported(f"{prefix}{name.rpartition('.')[0]}: shares parameters with another layer")


def _shared(module: nn.Module, prefix: str) -> Apply:
    """Run a layer without parameters: workers and samples are one batch."""
    return lambda rows, x: module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _elementwise(module: nn.Module, prefix: str) -> Apply:
    return lambda rows, x: module(x)


def _flatten(module: nn.Flatten, prefix: str) -> Apply:
    if module.start_dim != 1 or module.end_dim != -1:
        raise Unsupported(f"{prefix.rstrip('.')}: Flatten of some axes only")
    return lambda rows, x: x.flatten(2)


def _linear(module: nn.Linear, prefix: str) -> Apply:
    weight, bias = f"{prefix}weight", f"{prefix}bias"

    def apply(rows: Stack, x: Tensor) -> Tensor:
        flat = x.flatten(1, -2)  # [W, B * positions, in]
        if module.bias is None:
            out = torch.bmm(flat, rows[weight].mT)
        else:
            out = torch.baddbmm(rows[bias][:, None], flat, rows[weight].mT)
        return out.view(*x.shape[:-1], -1)

    return apply


def _conv2d(module: nn.Conv2d, prefix: str) -> Apply:
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    if module.padding_mode != "zeros":
        raise Unsupported(f"{prefix.rstrip('.')}: Conv2d with padding mode {module.padding_mode}")

    def apply(rows: Stack, x: Tensor) -> Tensor:
        w = x.shape[0]
        joined = x.transpose(0, 1).flatten(1, 2)  # [B, W * C, H, W']
        kernel = rows[weight].flatten(0, 1)  # [W * out, C / groups, k, k]
        shift = None if module.bias is None else rows[bias].flatten()
        out = F.conv2d(
            joined,
            kernel,
            shift,
            module.stride,
            module.padding,
            module.dilation,
            module.groups * w,
        )
        return out.unflatten(1, (w, -1)).transpose(0, 1)

    return apply


def _normalised(module: nn.GroupNorm | nn.LayerNorm, prefix: str) -> Apply:
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    is_group = isinstance(module, nn.GroupNorm)

    def apply(rows: Stack, x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            out = F.group_norm(x.flatten(0, 1), module.num_groups, eps=module.eps).view(x.shape)
        else:
            out = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        for name, combine in ((weight, torch.mul), (bias, torch.add)):
            if name in rows:
                # [W, C] against [W, B, C, H, W'], or [W, *shape] against [W, B, ..., *shape]
                p = rows[name]
                before = 1 if is_group else x.ndim - p.ndim
                after = x.ndim - 3 if is_group else 0
                shape = p.shape[:1] + (1,) * before + p.shape[1:] + (1,) * after
                out = combine(out, p.view(shape))
        return out

    return apply


def _embedding(module: nn.Embedding, prefix: str) -> Apply:
    weight = f"{prefix}weight"
    if module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq:
        raise Unsupported(f"{prefix.rstrip('.')}: Embedding with padding_idx, max_norm or scale_grad_by_freq")

    def apply(rows: Stack, x: Tensor) -> Tensor:
        table = rows[weight]  # [W, V, D]
        first = torch.arange(table.shape[0], device=x.device) * table.shape[1]
        return F.embedding(x + first.view(-1, *(1,) * (x.ndim - 1)), table.flatten(0, 1))

    return apply


def _attention(module: SelfAttention, prefix: str) -> Apply:
    qkv, out = _linear(module.qkv, f"{prefix}qkv."), _linear(module.out, f"{prefix}out.")
    causal = isinstance(module, CausalSelfAttention)

    def apply(rows: Stack, x: Tensor) -> Tensor:
        # [W, B, T, 3 width] -> three of [W * B, heads, T, d]; only the affine maps differ between workers
        parts = qkv(rows, x).flatten(0, 1).unflatten(-1, (3, module.heads, -1))
        q, k, v = parts.movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out(rows, mixed.transpose(-3, -2).flatten(-2).unflatten(0, x.shape[:2]))

    return apply


def _decoder(module: Decoder, prefix: str) -> Apply:
    embedding = _embedding(module.embedding, f"{prefix}embedding.")
    body = stack_module(module.body, f"{prefix}body.")
    # A tied head is the embedding's matrix a second time: one entry of the tree, read at both ends.
    head = f"{prefix}embedding.weight" if module.head is None else f"{prefix}head.weight"
    position = f"{prefix}position.weight"

    def apply(rows: Stack, tokens: Tensor) -> Tensor:
        x = embedding(rows, tokens) + rows[position][:, None, : tokens.shape[-1]]
        x = body(rows, x)
        return torch.bmm(x.flatten(1, 2), rows[head].mT).unflatten(1, tokens.shape[1:])

    return apply


_LAYERS: dict[type, Callable[..., Apply]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _normalised,
    nn.LayerNorm: _normalised,
    nn.Embedding: _embedding,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _shared,
    nn.AvgPool2d: _shared,
    nn.AdaptiveAvgPool2d: _shared,
    nn.ReLU: _elementwise,
    nn.Tanh: _elementwise,
    nn.GELU: _elementwise,
    nn.SiLU: _elementwise,
    nn.Sigmoid: _elementwise,
    nn.Identity: _elementwise,
}


def laid_out(module: nn.Module, theta: Tree) -> Tree:
    """Lay the kernels of convolutions out with their channels last, and so all features behind them.

    Values and shapes stay the same. On a CPU pooling is then several times faster: rounds of a small network take 1.2 times
    less, evaluations up to 3 times. Float32 only, in which PyTorch's convolutions take this form, and only models of known
    layers: others may ask for views of features that this order does not have.

    Parameters
    ----------
    module : nn.Module
        The model.
    theta : Tree
        Its parameters, or a tree of the same shapes.

    Returns
    -------
    Tree
        The same leaves where nothing is gained.
    """
    kinds = {type(layer) for layer in module.modules()}
    known = kinds <= {*_LAYERS, nn.Sequential, Residual}
    if not known or nn.Conv2d not in kinds:
        return theta

    def lay(x: Tensor) -> Tensor:
        fits = x.ndim == 4 and x.dtype == torch.float32 and x.device.type == "cpu"
        # Not `contiguous`, which leaves strides alone where there is one channel: the features behind follow them.
        return x.to(memory_format=torch.channels_last) if fits else x

    return {k: lay(x) for k, x in theta.items()}


def is_chain(module: nn.Module) -> bool:
    """Whether a module is a chain of affine maps and activations, see `Chain`."""
    try:
        Chain(module)
    except Unsupported:
        return False
    return True


class Chain:
    """Affine maps and elementwise activations in a row, with the backward pass written out.

    Parameters
    ----------
    module : nn.Module
        Sequential chain of Flatten, Linear, ReLU, Tanh and Identity that ends with a Linear.

    Raises
    ------
    Unsupported
        If the module is anything else.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers: list[tuple[str, str | None, type | None]] = []  # weight, bias, activation behind it
        if type(module) is not nn.Sequential:
            raise Unsupported("not a plain chain")
        _check_shared(module)
        for name, layer in _children(module):
            if type(layer) is nn.Linear:
                self.layers.append((
                    f"{name}.weight",
                    f"{name}.bias" if layer.bias is not None else None,
                    None,
                ))
            elif type(layer) in {nn.ReLU, nn.Tanh} and self.layers and self.layers[-1][2] is None:
                self.layers[-1] = (*self.layers[-1][:2], type(layer))
            elif type(layer) is not nn.Identity and (type(layer) is not nn.Flatten or self.layers):
                raise Unsupported(f"{name}: {type(layer).__name__}")
        if not self.layers or self.layers[-1][2] is not None:
            raise Unsupported("the chain does not end with a Linear")

    def forward(self, rows: Stack, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs ``[W, B, C]`` and the input of every layer."""
        inputs = []
        x = x.flatten(2)
        for weight, bias, activation in self.layers:
            inputs.append(x)
            if bias is None:
                x = torch.bmm(x, rows[weight].mT)
            else:
                x = torch.baddbmm(rows[bias].unsqueeze(1), x, rows[weight].mT)
            if activation is nn.ReLU:
                x = x.relu_()
            elif activation is nn.Tanh:
                x = x.tanh_()
        return x, inputs

    def gradient(self, rows: Stack, inputs: list[Tensor], delta: Tensor) -> Stack:
        """Return the gradient, leaves ``[W, *]``, for ``delta`` ``[W, B, C]``, the derivative by the output."""
        out: Stack = {}
        for i in reversed(range(len(self.layers))):
            weight, bias, _ = self.layers[i]
            out[weight] = torch.bmm(delta.mT, inputs[i])
            if bias is not None:
                out[bias] = delta.sum(1)
            if i:
                delta = self._through(i, rows, inputs, delta)
        return {k: out[k] for k in rows}

    def descend(self, rows: Stack, inputs: list[Tensor], delta: Tensor, lr: float) -> None:
        """Subtract ``lr`` times the gradient from ``rows`` in place, without forming it."""
        for i in reversed(range(len(self.layers))):
            weight, bias, _ = self.layers[i]
            below = self._through(i, rows, inputs, delta) if i else delta
            rows[weight].baddbmm_(delta.mT, inputs[i], alpha=-lr)
            if bias is not None:
                rows[bias].sub_(delta.sum(1), alpha=lr)
            delta = below

    def _through(self, i: int, rows: Stack, inputs: list[Tensor], delta: Tensor) -> Tensor:
        """Carry the derivative by the output of layer i to the output of layer i - 1."""
        below = torch.bmm(delta, rows[self.layers[i][0]])
        activation = self.layers[i - 1][2]
        if activation is nn.ReLU:
            return torch.ops.aten.threshold_backward(below, inputs[i], 0)
        if activation is nn.Tanh:
            return torch.ops.aten.tanh_backward(below, inputs[i])
        return below


def weighted_loss(objective: Objective, output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return each worker's mean loss, ``[W, B, *] -> [W]``; ``weight`` ``[W, B]`` sums to 1 for each worker."""
    loss = objective.loss(output, target)
    return loss.mean(1) if weight is None else (loss * weight).sum(1)

"""What workers reveal by disagreeing: how much of the dominant Hessian eigenspace the span of their gaps captures.

Letters: ``g`` ``[P]`` is the gradient of the whole training loss at the average of the workers, ``U`` ``[P, k]`` the
eigenvectors of the k largest eigenvalues of its Hessian there, ``g_dom = U U^T g``, and ``Q`` ``[P, q]`` an orthonormal
basis of the gaps (`fedsim.gaps.subspace`). Directions of large curvature or noise are where workers drift
apart, so ``Q`` finds ``U`` without a Hessian.

References
----------
Dimlioglu, Topollai, Choromanska 2026, arXiv 2605.27739; Song, Ahn, Yun 2024, arXiv 2405.16002.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim import random
from fedsim.analysis.hessian import TrainingLoss
from fedsim.gaps import CUT, Gaps, Subspace, subspace_of
from fedsim.tree import Tree


class Capture(NamedTuple):
    """How a subspace Q meets a gradient and a dominant eigenspace U.

    Attributes
    ----------
    chi : float
        ``|U^T g| / |g|``: share of the gradient in the dominant space; far lower at the average of the
        workers than at one of them or for a minibatch.
    capture : float
        ``|Q^T g_dom|^2 / |g_dom|^2``, in [0, 1].
    suppression : float
        ``1 - |U^T (g - Q Q^T g)| / |U^T g|``, at most 1; negative where the filter leaks bulk gradient into the
        dominant space, so read it next to chi.
    suppression_sq : float
        ``1 - |U^T (g - Q Q^T g)|^2 / |U^T g|^2``, ditto.
    overlap : float
        ``|U^T Q|_F^2 / k``: mean squared cosine of the principal angles, in [0, 1].
    angles : Tensor
        ``[k]`` principal angles in radians, ascending; pi / 2 where q < k.
    """

    chi: float
    capture: float
    suppression: float
    suppression_sq: float
    overlap: float
    angles: Tensor


def capture(gradient: Tensor, dominant: Tensor, subspace: Subspace | Tensor) -> Capture:
    """Compare a subspace with the dominant space, all in float64; O(n (k + 1) P) for a `Subspace` of n gaps.

    Parameters
    ----------
    gradient : Tensor
        ``[P]``, not orthogonal to ``dominant``.
    dominant : Tensor
        U, ``[P, k]``, orthonormal.
    subspace : Subspace or Tensor
        The span, or Q ``[P, q]`` itself, orthonormal.

    Returns
    -------
    Capture
        The metrics.
    """
    g, u = gradient.double(), dominant.to(gradient.device, torch.float64)
    vectors = torch.cat([g[None], u.T])
    found = (
        subspace.coordinates(vectors) if isinstance(subspace, Subspace) else subspace.double().T @ vectors.T
    )
    of_g, of_u = found[:, 0], found[:, 1:]  # Q^T g [q], Q^T U [q, k]
    inside = u.T @ g
    kept = inside - of_u.T @ of_g  # U^T (g - Q Q^T g)
    ratio = (kept.norm() / inside.norm()).item()
    k = u.shape[1]
    cosines = torch.zeros(k, dtype=torch.float64)
    singular = torch.linalg.svdvals(of_u).cpu()
    cosines[: len(singular)] = singular.clamp(0, 1)
    return Capture(
        chi=(inside.norm() / g.norm()).item(),
        capture=((of_u @ inside).norm() / inside.norm()).square().item(),
        suppression=1 - ratio,
        suppression_sq=1 - ratio**2,
        overlap=(of_u.square().sum() / k).item(),
        angles=cosines.arccos(),
    )


def chi(vector: Tensor, dominant: Tensor) -> float:
    """Return the share of a vector in the dominant space, ``|U^T v| / |v|``."""
    v = vector.double()
    return ((dominant.to(v).T @ v).norm() / v.norm()).item()


# --------------------------------------------------------------------------------------------- spectrum


def spectrum(gaps: Gaps) -> Tensor:
    """Return the eigenvalues of a round's gap covariance ``sum_m p_m gap_m gap_m^T`` that can differ from 0.

    Parameters
    ----------
    gaps : Gaps
        Of one round.

    Returns
    -------
    Tensor
        ``[M]`` float64, descending, >= 0; their sum is the squared consensus distance.
    """
    root = gaps.weight.sqrt()
    return torch.linalg.eigvalsh(root[:, None] * gaps.gram * root).flip(0).clamp(min=0)


def effective_rank(eigenvalues: Tensor) -> float:
    """Return ``exp(-sum_i s_i log s_i)`` with ``s_i = e_i / sum_j e_j``; 0 if all are zero.

    Parameters
    ----------
    eigenvalues : Tensor
        ``[n]``, >= 0.

    Returns
    -------
    float
        In [1, n], or 0.

    References
    ----------
    Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality.

    Examples
    --------
    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    total = eigenvalues.sum()
    if not total > 0:
        return 0.0
    return torch.special.entr(eigenvalues / total).sum().exp().item()


def consensus_distance(gaps: Gaps) -> float:
    """Return how far workers are from their average, ``sqrt(sum_m p_m |gap_m|^2)``."""
    return (gaps.weight @ gaps.gram.diagonal()).clamp(min=0).sqrt().item()


# -------------------------------------------------------------------------------------------- baselines


def random_basis(size: int, rank: int, seed: int, number: int = 0) -> Tensor:
    """Draw a uniformly random subspace: QR of a Gaussian matrix; capture and overlap are q / P on average.

    Parameters
    ----------
    size : int
        Parameters P.
    rank : int
        Dimension q, 1 <= q <= P.
    seed, number : int
        Name the draw; average over at least 20 numbers, one draw scatters by 30 %.

    Returns
    -------
    Tensor
        ``[P, q]`` float64, orthonormal.
    """
    generator = random.torch_generator(seed, "random subspace", number)
    return torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator)).Q


def random_capture(subspace: Subspace, draws: int, seed: int, number: int = 0) -> float:
    """Return the mean share of random vectors in a subspace, ``|Q^T z|^2 / |z|^2``, about q / P.

    A fixed subspace and a random vector have the same law as a fixed vector and a random subspace of that
    dimension, at a fraction of the cost; O(n draws P).

    Parameters
    ----------
    subspace : Subspace
        Of gaps.
    draws : int
        Vectors, >= 1.
    seed, number : int
        Name the draw.

    Returns
    -------
    float
        In [0, 1].
    """
    generator, like = random.torch_generator(seed, "random vectors", number), subspace.blocks[0]
    z = torch.randn(draws, like.shape[1], dtype=torch.float64, generator=generator).to(like.device)
    found = subspace.coordinates(z)
    return (found.square().sum(0) / z.square().sum(1)).mean().item()


def minibatch_gradients(
    problem: TrainingLoss, theta: Tree, batch: int, count: int, seed: int, number: int = 0, sketched: int = 0
) -> Tensor:
    """Return minibatch gradients at one point.

    Parameters
    ----------
    problem : TrainingLoss
        Model, objective and data.
    theta : Tree
        Where.
    batch : int
        Rows of a minibatch, drawn with replacement, >= 1.
    count : int
        Gradients n, >= 1.
    seed, number : int
        Name the draw.
    sketched : int
        Keep a `sketch` of so many numbers of each; 0 for all P.

    Returns
    -------
    Tensor
        ``[n, P]`` or ``[n, sketched]`` in the parameters' precision.
    """
    stream = random.numpy_generator(seed, "baseline gradients", number)
    like, found = next(iter(theta.values())), []
    for _ in range(count):
        rows = torch.from_numpy(stream.integers(len(problem.x), size=batch)).to(problem.x.device)
        gradient = problem.minibatch_gradient(theta, rows).to(like.dtype)
        found.append(sketch(gradient[None], sketched, seed)[0] if sketched else gradient)
    return torch.stack(found)


def gradient_subspace(
    problem: TrainingLoss, theta: Tree, batch: int, rank: int, seed: int, number: int = 0
) -> Subspace:
    """Return the span of ``rank + 1`` minibatch gradients at one point less their mean, a costly rival of the gaps.

    Parameters
    ----------
    problem, theta, batch, seed, number
        As in `minibatch_gradients`.
    rank : int
        Dimension q, >= 1.

    Returns
    -------
    Subspace
        Of dimension q for gradients in general position; some 20 (q + 1) P bytes on the way.
    """
    return span_of_centred(minibatch_gradients(problem, theta, batch, rank + 1, seed, number))


def span_of_centred(rows: Tensor) -> Subspace:
    """Return the span of the rows of ``[n, P]`` less their mean, computed in float64."""
    whole = rows.double()
    return subspace_of(whole - whole.mean(0))


# ----------------------------------------------------------------------------------------------- sketch


def sketch(vectors: Tensor, size: int, seed: int) -> Tensor:
    """Project vectors onto a few numbers each, ``(S v)_h = sum_{i: h(i) = h} s(i) v_i``, keeping inner products.

    A count sketch: bucket h(i) and sign s(i) are hashes of the coordinate, so that nothing is stored and
    sketches of different rounds fit together. ``E <S a, S b> = <a, b>`` with standard deviation at most
    ``sqrt(2 / size) |a| |b|``. A buffer of sketches takes 4 c size instead of 4 c P bytes; O(m P) time.

    Parameters
    ----------
    vectors : Tensor
        ``[m, P]``.
    size : int
        Numbers of a sketch, >= 1.
    seed : int
        Of the hashes.

    Returns
    -------
    Tensor
        ``[m, size]`` in the vectors' type.

    References
    ----------
    Charikar, Chen, Farach-Colton 2002, Finding frequent items in data streams; Woodruff 2014, Sketching as a tool
    for numerical linear algebra, arXiv 1411.4357.
    """
    coordinate = torch.arange(vectors.shape[1], device=vectors.device)
    hashed = random.bits(random.key(seed, "sketch"), coordinate)
    sign = 1 - 2 * (hashed & 1)
    bucket = ((hashed >> 32) & 0xFFFFFFFF) * size >> 32
    out = vectors.new_zeros(len(vectors), size)
    return out.index_add_(1, bucket, vectors * sign.to(vectors.dtype))


def sketched_capture(gradient: Tensor, dominant: Tensor, subspace: Subspace) -> tuple[float, float]:
    """Estimate capture and overlap when gaps, gradient and dominant vectors are known by their sketches only.

    The distance of a vector from a q-dimensional span shrinks under a random projection to s numbers by
    ``1 - q / s`` on average, so its share in the span is ``1 - d^2 / ((1 - q / s) |S v|^2)``; the error is about
    ``sqrt(2 / s)``.

    Parameters
    ----------
    gradient : Tensor
        ``[s]``, the sketch of ``g_dom``.
    dominant : Tensor
        ``[k, s]``, sketches of the dominant eigenvectors.
    subspace : Subspace
        Of the sketched gaps, of dimension q < s.

    Returns
    -------
    tuple of float
        Capture and overlap; they may leave [0, 1] by their error.

    Raises
    ------
    ValueError
        If the sketch is not larger than the dimension of the span.
    """
    s, q = len(gradient), subspace.rank
    if q >= s:
        raise ValueError(f"sketched_capture: sketches of {s} numbers cannot tell a span of dimension {q}")
    vectors = torch.cat([gradient[None], dominant]).double()
    inside = subspace.coordinates(vectors).square().sum(0)
    share = 1 - (1 - inside / vectors.square().sum(1)) / (1 - q / s)
    return share[0].item(), share[1:].mean().item()


# ----------------------------------------------------------------------------------------------- theory


def row_covariance(hessian: np.ndarray, noise: np.ndarray, lr: float, steps: int | None) -> np.ndarray:
    """Compute the covariance of a worker's row after a round on a quadratic, ``eta^2 sum_s A^s N A^s``.

    ``A = I - eta H`` and s = 0..tau-1; any symmetric N, commuting with H or not. The start cancels, so it
    holds in every round.

    Parameters
    ----------
    hessian : ndarray
        H, ``[d, d]``, symmetric.
    noise : ndarray
        N, ``[d, d]``, covariance of one stochastic gradient.
    lr : float
        Step size eta.
    steps : int or None
        Local steps tau >= 0; None for the limit, which needs ``|1 - eta lambda| < 1``.

    Returns
    -------
    ndarray
        ``[d, d]``.
    """
    a = np.eye(len(hessian)) - lr * hessian
    if steps is None:
        from scipy.linalg import solve_discrete_lyapunov

        return solve_discrete_lyapunov(a, lr**2 * noise)
    total, power = np.zeros_like(noise, dtype=float), np.eye(len(a))
    for _ in range(steps):
        total += power @ noise @ power.T
        power = power @ a
    return lr**2 * total


def gap_covariance(rows: list[np.ndarray], weight: np.ndarray, means: np.ndarray | None = None) -> np.ndarray:
    """Compute ``Sigma = E sum_m p_m gap_m gap_m^T`` from the workers' covariances ``S_m``.

    ``Sigma = sum_m p_m (1 - p_m) S_m + sum_m p_m d_m d_m^T`` with ``d_m = E x_m - sum_j p_j E x_j``; equal
    ``S_m = S`` give ``(1 - sum_m p_m^2) S``.

    Parameters
    ----------
    rows : list of ndarray
        M covariances ``[d, d]`` of the rows given the broadcast (see `row_covariance`).
    weight : ndarray
        ``[M]``, divided by its sum.
    means : ndarray or None
        ``[M, d]`` expected rows where they differ: unequal data or numbers of steps.

    Returns
    -------
    ndarray
        ``[d, d]``.
    """
    p = np.asarray(weight, dtype=float) / np.sum(weight)
    total = sum(q * (1 - q) * s for q, s in zip(p, rows, strict=True))
    if means is not None:
        d = means - p @ means
        total = total + (p[:, None] * d).T @ d
    return np.asarray(total)


def gap_variance(
    curvature: np.ndarray, noise: np.ndarray, lr: float, steps: int, weight: np.ndarray
) -> np.ndarray:
    """Compute the variance of gaps along eigenvectors: the curve that gaps follow, without a fitted constant.

    ``(1 - sum_m p_m^2) eta^2 n_i (1 - a_i^(2 tau)) / (1 - a_i^2)``, ``a_i = 1 - eta lambda_i``. While
    ``eta lambda tau`` is small it follows the noise; beyond about 5 it is flat in ``lambda`` for noise proportional
    to curvature, and the separation is gone.

    Parameters
    ----------
    curvature : ndarray
        Eigenvalues ``lambda_i``, ``[k]``, of any sign.
    noise : ndarray
        Variances ``n_i`` of a stochastic gradient along the eigenvectors, ``[k]`` (see `gradient_noise`).
    lr : float
        Step size eta.
    steps : int
        Local steps tau, >= 1.
    weight : ndarray
        ``[M]`` aggregation weights, divided by their sum.

    Returns
    -------
    ndarray
        ``[k]``.
    """
    p = np.asarray(weight, dtype=float) / np.sum(weight)
    powers = (1 - lr * np.asarray(curvature))[:, None] ** (2 * np.arange(steps))
    return (1 - np.sum(p**2)) * lr**2 * np.asarray(noise) * powers.sum(1)


__all__ = [
    "CUT",
    "Capture",
    "capture",
    "chi",
    "consensus_distance",
    "effective_rank",
    "gap_covariance",
    "gap_variance",
    "gradient_subspace",
    "minibatch_gradients",
    "random_basis",
    "random_capture",
    "row_covariance",
    "sketch",
    "sketched_capture",
    "span_of_centred",
    "spectrum",
]

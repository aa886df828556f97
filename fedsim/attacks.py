"""Attackers: workers that poison their labels or send something else than what they have trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim import checks, random, tree
from fedsim.tree import Stack


@dataclass(frozen=True)
class Attack:
    """Who attacks, and how: frozen dataclasses with these verbs. The base class poisons nothing and sends what was trained.

    A subclass that has a verb of its own says so: ``poisons`` for `poison`, ``corrupts`` for `corrupt`.

    Parameters
    ----------
    share : float
        Share of the workers that attack, in [0, 1]; ``round(share W)`` of them, drawn with the seed.

    Raises
    ------
    ValueError
        If ``share`` is outside [0, 1].
    """

    poisons: ClassVar[bool] = False
    corrupts: ClassVar[bool] = False

    share: float = 0.2

    def __post_init__(self) -> None:
        checks.share(self, "share")

    def attackers(self, num_workers: int, seed: int) -> Tensor:
        """Draw the attackers, of which more come with a larger share and none goes.

        Parameters
        ----------
        num_workers : int
            Workers W of the run.
        seed : int
            Seed of the run.

        Returns
        -------
        Tensor
            ``[W]`` bool, the same in every round.
        """
        chosen, number = torch.zeros(num_workers, dtype=torch.bool), round(self.share * num_workers)
        if number:
            order = random.bits(random.key(seed, "attackers"), torch.arange(num_workers)).argsort()
            chosen[order[:number]] = True
        return chosen

    def poison(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels on which attackers train, like ``labels``."""
        return labels

    def corrupt(self, before: Stack, after: Stack, round: int, worker: Tensor, seed: int) -> Stack:
        """Return the rows that attackers send.

        Parameters
        ----------
        before, after : Stack
            Their rows at the start of the round and as trained, leaves ``[m, *]``.
        round : int
            Round, from 1.
        worker : Tensor
            ``[m]`` ids.
        seed : int
            Seed of the run.

        Returns
        -------
        Stack
            Leaves ``[m, *]``.
        """
        return after


@dataclass(frozen=True)
class NoAttack(Attack):
    """All workers are honest."""

    share: float = 0.0

    def __post_init__(self) -> None:
        if self.share:
            raise ValueError(
                f"NoAttack: share = {self.share} must be 0; name an attack, such as LabelFlip(share=0.2)"
            )


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Attackers train on flipped labels, ``y -> C - 1 - y`` for C classes, and are honest otherwise.

    Their held-out rows keep their labels. For targets that are not labels there is no such attack.

    Parameters
    ----------
    share : float
        Share of the workers that attack, in [0, 1].

    References
    ----------
    Yin, Chen, Ramchandran, Bartlett (2018), Byzantine-robust distributed learning: towards optimal statistical
    rates, arXiv:1803.01498. Fang, Cao, Jia, Gong (2020), Local model poisoning attacks to Byzantine-robust federated
    learning, arXiv:1911.11815.
    """

    poisons: ClassVar[bool] = True

    def poison(self, labels: Tensor, num_classes: int) -> Tensor:
        """Flip."""
        return num_classes - 1 - labels


@dataclass(frozen=True)
class ScaledUpdate(Attack):
    """Attackers send ``theta + scale (theta_i - theta)`` for the row ``theta_i`` that they trained from ``theta``.

    A negative ``scale`` turns the update around; ``scale = W`` among honest updates that have died out replaces the mean by
    the attacker's row.

    Parameters
    ----------
    share : float
        Share of the workers that attack, in [0, 1].
    scale : float
        Factor of the update, finite.

    References
    ----------
    Bagdasaryan, Veit, Hua, Estrin, Shmatikov (2018), How to backdoor federated learning, arXiv:1807.00459.
    """

    corrupts: ClassVar[bool] = True

    scale: float = -4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.finite(self, "scale")

    def corrupt(self, before: Stack, after: Stack, round: int, worker: Tensor, seed: int) -> Stack:
        """Scale the updates."""
        return tree.lerp(before, after, self.scale)


@dataclass(frozen=True)
class GaussianUpdate(Attack):
    """Attackers send ``theta + std z`` with standard normal ``z`` in place of what they trained from ``theta``.

    Parameters
    ----------
    share : float
        Share of the workers that attack, in [0, 1].
    std : float
        Standard deviation of each entry, > 0.

    References
    ----------
    Blanchard, El Mhamdi, Guerraoui, Stainer (2017), Machine learning with adversaries: Byzantine tolerant gradient
    descent, arXiv:1703.02757.
    """

    corrupts: ClassVar[bool] = True

    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.finite(self, "std")
        checks.positive(self, "std")

    def corrupt(self, before: Stack, after: Stack, round: int, worker: Tensor, seed: int) -> Stack:
        """Draw; every entry has a number of its own."""
        key, first, sent = random.key(seed, "attack", round), 0, {}
        for name, x in before.items():
            places = torch.arange(first, first + x[0].numel(), device=x.device)
            z = random.normal(key, worker[:, None], places).view(x.shape)
            sent[name], first = x + self.std * z.to(x.dtype), first + len(places)
        return sent

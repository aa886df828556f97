"""Local rules: what one worker does in one step. One rule a file."""

from clients.adamw import AdamW
from clients.adaptive_sgd import AdaptiveSGD
from clients.base import LocalRule, Oracle, State, Told, told
from clients.clipped import Clipped
from clients.controlled import Controlled
from clients.filtered import Filtered
from clients.fresh import Fresh
from clients.gaussian import Gaussian
from clients.guided import Guided
from clients.irm import IRM
from clients.loss_normalised import LossNormalised
from clients.nesterov import Nesterov
from clients.palsgd import PALSGD
from clients.projection import Projection
from clients.prox import Prox
from clients.sam import SAM
from clients.sasam import SASAM
from clients.scaled_sgd import ScaledSGD
from clients.sgd import SGD
from clients.step_decay import StepDecay
from clients.warmup_cosine import WarmupCosine

__all__ = [
    "IRM",
    "PALSGD",
    "SAM",
    "SASAM",
    "SGD",
    "AdamW",
    "AdaptiveSGD",
    "Clipped",
    "Controlled",
    "Filtered",
    "Fresh",
    "Gaussian",
    "Guided",
    "LocalRule",
    "LossNormalised",
    "Nesterov",
    "Oracle",
    "Projection",
    "Prox",
    "ScaledSGD",
    "State",
    "StepDecay",
    "Told",
    "WarmupCosine",
    "told",
]

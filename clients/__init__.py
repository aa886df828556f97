"""Local rules: what one worker does in one step. One rule a file."""

from clients.adamw import AdamW
from clients.base import LocalRule, Oracle, State, Told, told
from clients.filtered import Filtered
from clients.nesterov import Nesterov
from clients.projection import Projection
from clients.prox import Prox
from clients.sgd import SGD

__all__ = [
    "SGD",
    "AdamW",
    "Filtered",
    "LocalRule",
    "Nesterov",
    "Oracle",
    "Projection",
    "Prox",
    "State",
    "Told",
    "told",
]

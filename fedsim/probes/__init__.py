"""Probes: what to measure in a round."""

from fedsim.probes.base import Clock, Memory, Probe, Snapshot
from fedsim.probes.bias import Bias
from fedsim.probes.direction import Direction
from fedsim.probes.disagreement import Disagreement
from fedsim.probes.environments import Environments
from fedsim.probes.geometry import Geometry
from fedsim.probes.leaders import Leaders
from fedsim.probes.normalised_margin import NormalisedMargin
from fedsim.probes.privacy import PrivacyLoss
from fedsim.probes.sharpness import Sharpness
from fedsim.probes.workers import Drift, WorkerLoss

__all__ = [
    "Bias",
    "Clock",
    "Direction",
    "Disagreement",
    "Drift",
    "Environments",
    "Geometry",
    "Leaders",
    "Memory",
    "NormalisedMargin",
    "PrivacyLoss",
    "Probe",
    "Sharpness",
    "Snapshot",
    "WorkerLoss",
]

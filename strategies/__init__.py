"""Strategies: what the server does in a sync. One rule a file; each is a Flower strategy."""

from strategies.anchored import AnchoredAverage
from strategies.base import Broadcast, MeanRule, Report, Rule, Score, State, Traffic, from_record, to_record
from strategies.downpour import Downpour
from strategies.elastic import ElasticAveraging
from strategies.fedavg import FedAvg, LocalGD
from strategies.gap_filter import GapFilter
from strategies.leader import LeaderGD, LeaderSGD
from strategies.robust import FedMedian, TrimmedMean
from strategies.server_opt import FedAdagrad, FedAdam, FedAvgM, FedYogi

__all__ = [
    "AnchoredAverage",
    "Broadcast",
    "Downpour",
    "ElasticAveraging",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedYogi",
    "GapFilter",
    "LeaderGD",
    "LeaderSGD",
    "LocalGD",
    "MeanRule",
    "Report",
    "Rule",
    "Score",
    "State",
    "Traffic",
    "TrimmedMean",
    "from_record",
    "to_record",
]

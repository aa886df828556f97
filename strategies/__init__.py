"""Strategies: what the server does in a sync. One rule a file; each is a Flower strategy."""

from strategies.anchored import AnchoredAverage
from strategies.async_diloco import AsyncDiLoCo
from strategies.base import Broadcast, MeanRule, Report, Rule, Score, State, Traffic, from_record, to_record
from strategies.compressed import Compressed
from strategies.diloco import DiLoCo
from strategies.dominant_filter import DominantFilter
from strategies.downpour import Downpour
from strategies.dp_fedavg import DPFedAvg
from strategies.elastic import ElasticAveraging
from strategies.fedavg import FedAvg, LocalGD
from strategies.fedcm import FedCM
from strategies.fedsgd import FedIRM, FedSGD
from strategies.gap_filter import GapFilter
from strategies.known_loss import DualAcceleration, KnownLoss
from strategies.leader import LeaderGD, LeaderSGD
from strategies.low_bit import LowBit
from strategies.pooled_irm import PooledIRM
from strategies.robust import FedMedian, TrimmedMean
from strategies.scaffold import Scaffold
from strategies.server_opt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.streaming import StreamingDiLoCo
from strategies.top_k import TopK

__all__ = [
    "AnchoredAverage",
    "AsyncDiLoCo",
    "Broadcast",
    "Compressed",
    "DPFedAvg",
    "DiLoCo",
    "DominantFilter",
    "Downpour",
    "DualAcceleration",
    "ElasticAveraging",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedCM",
    "FedIRM",
    "FedMedian",
    "FedSGD",
    "FedYogi",
    "GapFilter",
    "KnownLoss",
    "LeaderGD",
    "LeaderSGD",
    "LocalGD",
    "LowBit",
    "MeanRule",
    "PooledIRM",
    "Report",
    "Rule",
    "Scaffold",
    "Score",
    "State",
    "StreamingDiLoCo",
    "TopK",
    "Traffic",
    "TrimmedMean",
    "from_record",
    "to_record",
]

"""Data: sources that give rows, and partitions that share them out among workers."""

from fedsim.data.cropped import Cropped
from fedsim.data.cuts import Cuts
from fedsim.data.dataset import Dataset, Domains, Source
from fedsim.data.domains import ColoredDigits, RotatedDigits
from fedsim.data.flower_partitions import FlowerDatasets
from fedsim.data.frozen import FrozenFeatures
from fedsim.data.hub import Folder, Hub
from fedsim.data.margin import LinearRegression, Mixed, NearDegenerate, NonSeparable, Separable, Toy
from fedsim.data.next_kind import NextKind
from fedsim.data.pair import Pair
from fedsim.data.partitions import (
    IID,
    ByLabel,
    ByQuantity,
    Contiguous,
    Dirichlet,
    Natural,
    Partition,
    Pathological,
    Shared,
)
from fedsim.data.shards import Shards, hold_out
from fedsim.data.shifted import Shifted
from fedsim.data.sources import CIFAR10, MNIST, Digits, TinyShakespeare, TinyStories
from fedsim.data.synthetic import Synthetic
from fedsim.data.toys import Blank, LowRank, Parabolas

__all__ = [
    "CIFAR10",
    "IID",
    "MNIST",
    "Blank",
    "ByLabel",
    "ByQuantity",
    "ColoredDigits",
    "Contiguous",
    "Cropped",
    "Cuts",
    "Dataset",
    "Digits",
    "Dirichlet",
    "Domains",
    "FlowerDatasets",
    "Folder",
    "FrozenFeatures",
    "Hub",
    "LinearRegression",
    "LowRank",
    "Mixed",
    "Natural",
    "NearDegenerate",
    "NextKind",
    "NonSeparable",
    "Pair",
    "Parabolas",
    "Partition",
    "Pathological",
    "RotatedDigits",
    "Separable",
    "Shards",
    "Shared",
    "Shifted",
    "Source",
    "Synthetic",
    "TinyShakespeare",
    "TinyStories",
    "Toy",
    "hold_out",
]

"""Any partitioner of the package flwr-datasets by its name."""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass

import numpy as np

from fedsim.data.dataset import Dataset
from fedsim.data.partitions import check_no_worker_empty, check_workers
from fedsim.data.shards import Shards
from fedsim.random import key


@dataclass(frozen=True)
class FlowerDatasets:
    """A partitioner of flwr-datasets, e.g. ``FlowerDatasets("ShardPartitioner", ("num_shards_per_partition=2",))``.

    ``num_partitions``, ``partition_by`` and ``seed`` are filled in where the partitioner has them: the number of
    workers, the column of labels (of natural workers for a ``NaturalId`` one) and a number made from the run's seed.

    Parameters
    ----------
    name : str
        A class of ``flwr_datasets.partitioner``.
    options : tuple[str, ...]
        Its other arguments, each ``"argument=literal"``.

    Raises
    ------
    ValueError
        If an option is not of that form.
    """

    name: str = "DirichletPartitioner"
    options: tuple[str, ...] = ("alpha=0.3",)

    def __post_init__(self) -> None:
        self._arguments()

    def assign(self, dataset: Dataset, num_workers: int, seed: int) -> Shards:
        """Share out the rows as the partitioner does.

        Parameters
        ----------
        dataset : Dataset
            What is shared out.
        num_workers : int
            Number of workers, 1 <= W <= N.
        seed : int
            Seed of the run.

        Returns
        -------
        Shards
            The parts, in order of partition id.

        Raises
        ------
        ModuleNotFoundError
            If the extra ``fedsim[partitioners]`` is not installed.
        ValueError
            If the partitioner or one of its arguments is unknown, it makes another number of parts, or one is empty.
        """
        n = check_workers(dataset, num_workers)
        try:
            module = importlib.import_module("flwr_datasets.partitioner")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.name} needs flwr-datasets: install the extra fedsim[partitioners]"
            ) from error
        names = sorted(name for name in module.__all__ if name != "Partitioner" and "Vertical" not in name)
        if self.name not in names:
            raise ValueError(f"FlowerDatasets: name = {self.name!r} must be one of {', '.join(names)}")
        kind = getattr(module, self.name)
        by = "worker" if "NaturalId" in self.name else "label"
        given = {
            "num_partitions": num_workers,
            "partition_by": by,
            "seed": key(seed, "partition") & (2**32 - 1),
        }
        accepted = inspect.signature(kind).parameters
        arguments = {k: v for k, v in given.items() if k in accepted} | self._arguments()
        unknown = sorted(set(arguments) - set(accepted))
        if unknown:
            raise ValueError(f"{self.name}: unknown option {unknown[0]!r}, there are {', '.join(accepted)}")

        partitioner = kind(**arguments)
        partitioner.dataset = _table(self.name, dataset, str(arguments.get("partition_by", "")))
        if partitioner.num_partitions != num_workers:
            raise ValueError(
                f"{self.name}: makes {partitioner.num_partitions:,} parts of {dataset.name}, "
                f"num-workers is {num_workers:,}"
            )
        worker = np.full(n, -1, dtype=np.int64)
        for i in range(num_workers):
            worker[np.asarray(partitioner.load_partition(i)["row"][:], dtype=np.int64)] = i
        shards = Shards.from_assignment(worker, num_workers)
        return check_no_worker_empty(self.name, shards, dataset, "change its options or lower num-workers")

    def _arguments(self) -> dict[str, object]:
        arguments = {}
        for option in self.options:
            name, _, value = option.partition("=")
            try:
                arguments[name.strip()] = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                raise ValueError(
                    f"FlowerDatasets: option {option!r} must be 'argument=literal', e.g. 'alpha=0.3'"
                ) from None
        return arguments


def _table(partitioner: str, dataset: Dataset, by: str) -> object:
    """Row numbers with the columns a partitioner may read."""
    import datasets

    columns: dict[str, np.ndarray] = {"row": np.arange(len(dataset.x))}
    if dataset.y.ndim == 1:
        columns["label"] = dataset.y.cpu().numpy()
    if dataset.workers is not None:
        columns["worker"] = dataset.workers.cpu().numpy()
    if by and by not in columns:
        raise ValueError(f"{partitioner}: partitions by {by!r}, {dataset.name} has only {', '.join(columns)}")
    return datasets.Dataset.from_dict(columns)

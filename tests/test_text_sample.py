"""Text that a language model draws: closed forms, frequencies, the seed, and where a run shows it."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim import report, text_sample
from fedsim.data import Dataset, Shards
from fedsim.federation import Federation, load
from fedsim.registry import REGISTRY

LETTERS = ("a", "b", "<")


class Next(nn.Module):
    """Logits of the next token are a row of a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rows[tokens]


@dataclass(frozen=True)
class Table:
    """A model of the likelihoods ``p[i][j]`` that j follows i."""

    p: tuple[tuple[float, ...], ...]

    def build(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return Next(torch.tensor(self.p).log())


@dataclass(frozen=True)
class Letters:
    """Windows of four letters."""

    def load(self, seed: int, num_workers: int) -> Dataset:
        text = torch.arange(60).remainder(3).view(12, 5)
        x, y = text[:, :-1], text[:, 1:]
        return Dataset(x[:8], y[:8], x[8:], y[8:], 3, "tokens", "letters", labels=LETTERS)


CYCLE = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
MIXED = ((0.2, 0.5, 0.3), (0.2, 0.5, 0.3), (0.2, 0.5, 0.3))


def model_of(p: tuple[tuple[float, ...], ...]) -> Federation:
    module = Table(p).build((4,), 3)
    dataset = Letters().load(0, 2)
    shards = Shards(torch.arange(8), torch.tensor([0, 4, 8]))
    theta = {k: x.detach() for k, x in module.named_parameters()}
    objective = fedsim.Experiment().parts.objective
    return Federation(dataset, shards, shards, module, theta, objective)


def test_a_sure_model_says_what_it_must() -> None:
    f = model_of(CYCLE)
    said = text_sample.draw(f, f.theta, seed=0, length=7)
    assert said == {"prompt": "b<ab", "text": "<ab<ab<"}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_letters_are_as_frequent_as_they_are_likely(temperature: float) -> None:
    f, n = model_of(MIXED), 3000
    text = text_sample.draw(f, f.theta, seed=3, length=n, temperature=temperature)["text"]
    p = torch.tensor(MIXED[0]).double() ** (1 / temperature)
    for letter, share in zip(LETTERS, (p / p.sum()).tolist(), strict=True):
        assert abs(text.count(letter) / n - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_the_seed_alone_decides() -> None:
    f = model_of(MIXED)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = text_sample.draw(f, f.theta, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert text_sample.draw(f, f.theta, seed=0) == one
    assert text_sample.draw(f, f.theta, seed=1) != one
    assert text_sample.draw(f, f.theta, seed=0, length=5)["text"] == one["text"][:5]


def test_a_run_on_text_writes_a_sample_and_its_report_shows_it(tmp_path: Path) -> None:
    fedsim.register("data", Letters)
    try:
        e = fedsim.Experiment(
            data="Letters()", partition="IID()", model="Transformer(layers=1, width=4, heads=2)", num_workers=2,
            rounds=1, local_steps=1, batch_size=2, out=str(tmp_path / "run"), device="cpu",
        )  # fmt: skip
        done = fedsim.run(e, draw=False)
        sample = text_sample.read(done.path)
        assert sample == text_sample.draw(load(e), done.model, e.seed)
        assert len(sample["text"]) == text_sample.LENGTH
        page = report.write(done.path).read_text(encoding="utf-8")
        assert (
            f'<span class="soft">{html.escape(sample["prompt"])}</span>{html.escape(sample["text"])}</pre>'
            in page
        )
    finally:
        del REGISTRY["data"]["Letters"]


def test_other_runs_write_none(tmp_path: Path) -> None:
    e = fedsim.Experiment(num_workers=2, rounds=1, local_steps=1, model="Linear()", out=str(tmp_path / "run"))
    done = fedsim.run(e, draw=False)
    assert not (done.path / text_sample.FILE).exists()
    assert 'id="sample"' not in report.write(done.path).read_text(encoding="utf-8")

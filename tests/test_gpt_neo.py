"""GPT-Neo of transformers: its size, its gradients under every plan that takes it, and what is said without the library."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import fedsim
from fedsim.gpt_neo import GPTNeo
from fedsim.models import initialise
from fedsim.registry import parse
from fedsim.tree import num_parameters


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs the extra fedsim[transformers]")
    # Text needs no pictures, and a torchvision that was made for another torch would stop the import.
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.mark.slow
@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("spec", "context", "vocabulary"), [(GPTNeo(), 300, 50257), (GPTNeo(layers=3, width=6, heads=3), 5, 7)]
)
def test_its_size(spec: GPTNeo, context: int, vocabulary: int) -> None:
    _, theta = initialise(spec, (context,), vocabulary, seed=0)
    d = spec.width
    block = 4 * d * d + d + 8 * d * d + 5 * d + 4 * d  # attention, its output's bias, the network, two norms
    assert num_parameters(theta) == (vocabulary + context) * d + spec.layers * block + 2 * d


@pytest.mark.slow
@pytest.mark.usefixtures("_installed")
def test_plans_are_equal_and_text_is_learnt() -> None:
    from test_text_sample import LETTERS, Letters

    fedsim.register("data", Letters)
    try:
        ends = []
        for plan in ("loop", "vmap"):
            e = fedsim.Experiment(
                data="Letters()", partition="IID()", model="GPTNeo(layers=2, width=8, heads=2, window=2)", num_workers=2,
                rounds=4, local_steps=8, batch_size=4, client="AdamW(lr=0.02)", plan=plan, dtype="float64", device="cpu",
            )  # fmt: skip
            *_, (last, _) = fedsim.rounds(e)
            ends.append(last)
    finally:
        del fedsim.registry.REGISTRY["data"]["Letters"]
    assert abs(ends[0].metrics["test_loss"] - ends[1].metrics["test_loss"]) < 1e-6
    # The next letter of a cycle is certain; a guess among the letters has perplexity 3.
    assert ends[0].metrics["test_perplexity"] < 1.5 < len(LETTERS)


@pytest.mark.slow
@pytest.mark.usefixtures("_installed")
def test_it_is_causal() -> None:
    module, theta = initialise(GPTNeo(layers=2, width=8, heads=2), (4,), 5, seed=0, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 2, 3]])
    before = torch.func.functional_call(module, theta, (tokens,))
    after = torch.func.functional_call(module, theta, (torch.tensor([[0, 1, 2, 4]]),))
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 3], before[:, 3])


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"^GPTNeo needs transformers: install the extra fedsim\[transformers\]$"
    ):
        GPTNeo().build((4,), 5)


def test_bad_arguments_are_one_line() -> None:
    with pytest.raises(fedsim.BadInput, match="GPTNeo: heads = 3 must divide width = 128"):
        parse("model", "GPTNeo(heads=3)")
    with pytest.raises(ValueError, match=r"GPTNeo: input_shape = .* must be \(context,\), samples of tokens"):
        GPTNeo().build((1, 8, 8), 10)

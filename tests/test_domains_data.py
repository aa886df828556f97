"""Domains: colours, angles, and how domains differ."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from domains_toys import TINY
from sklearn.datasets import load_digits

from fedsim import Experiment
from fedsim.analysis.shifts import between_workers, clusters, shift
from fedsim.data import MNIST, ColoredDigits, Digits, RotatedDigits, Shifted
from fedsim.data.domains import draw_environment, grey, rotate
from fedsim.federation import load

IMAGES = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)


# ------------------------------------------------------------------------------------------------- colours


def test_balanced_cells_are_exact() -> None:
    training, inside, outside = ColoredDigits().environments(seed=3)
    for e, environment in zip((0.3, 0.1, 0.3, 0.1, 0.9), (*training, *inside, outside), strict=True):
        cells = Counter(
            zip(
                environment.base,
                environment.y == environment.base,
                environment.colour == environment.y,
                strict=True,
            )
        )
        for base in (0, 1):
            for right, m in ((True, 750), (False, 250)):
                assert cells[base, right, False] == round(e * m)
                assert cells[base, right, True] == m - round(e * m)


def test_cells_of_the_training_domains() -> None:
    for e, wanted in ((0.3, [525, 225, 175, 75]), (0.1, [675, 75, 225, 25])):
        x, digit = grey("digits")
        found = draw_environment(np.random.default_rng(0), x, digit, 2000, e)
        one = found.base == 1
        counts = [
            int((one & ((found.y == 1) == label) & ((found.colour == found.y) == colour)).sum())
            for label in (True, False)
            for colour in (True, False)
        ]
        assert counts == wanted


def test_one_channel_is_empty_and_pools_are_disjoint() -> None:
    source = ColoredDigits(rows=200)
    training, inside, outside = source.environments(seed=0)
    for environment in (*training, *inside, outside):
        filled = environment.x.reshape(200, 2, 64).any(2)
        assert (filled.sum(1) == 1).all()
        assert (filled.argmax(1) == environment.colour).all()
    train, test = source.pools(seed=0)
    assert (len(train), len(test), len(np.intersect1d(train, test))) == (1347, 450, 0)
    assert not np.array_equal(training[0].y, training[1].y)


def test_coins_have_the_rates_of_the_domain() -> None:
    x, digit = grey("digits")
    for e in (0.1, 0.3, 0.9):
        found = draw_environment(np.random.default_rng(1), x, digit, 20_000, e, sampling="bernoulli")
        assert abs((found.y != found.base).mean() - 0.25) < 0.015
        assert abs((found.colour != found.y).mean() - e) < 0.015


def test_colored_digits_have_the_documented_form() -> None:
    data = ColoredDigits(rows=100).load(seed=0, num_workers=2)
    assert data.x.shape == (200, 2, 8, 8)
    assert (data.task, data.num_outputs, data.x.dtype) == ("binary", 1, torch.float64)
    assert 0 <= data.x.min() < data.x.max() == 1
    assert data.domains is not None
    assert data.domains.x.shape == (200, 2, 8, 8)
    assert data.domains.names == ("colour flips 0.3", "colour flips 0.1")
    assert data.domains.held_out == "colour flips 0.9"
    grey_data = ColoredDigits(rows=100, as_grey=True).load(seed=0, num_workers=2)
    torch.testing.assert_close(grey_data.x, data.x.sum(1, keepdim=True))


# -------------------------------------------------------------------------------------------------- angles


def test_rotation_has_the_golden_numbers() -> None:
    image = IMAGES[:1] / 16
    assert image.sum() == pytest.approx(18.375)
    assert (image**2).sum() == pytest.approx(11.9921875)
    row = [
        0.0483532528, 0.3517210909, 0.6800198293, 0.0119894842, 0.0572147530, 0.5233458786, 0.4778879559, 0.0,
    ]  # fmt: skip
    at_15, at_30, at_75 = (rotate(image, a) for a in (15, 30, 75))
    assert at_15[0, 3].tolist() == pytest.approx(row, abs=1e-8)
    assert at_15.sum() == pytest.approx(15.7553141578, abs=1e-8)
    assert at_30.sum() == pytest.approx(16.9661094168, abs=1e-8)
    assert (at_30**2).sum() == pytest.approx(8.8012975038, abs=1e-8)
    assert at_75.sum() == pytest.approx(15.7087400339, abs=1e-8)


def test_rotation_by_0_is_the_identity_and_by_90_a_permutation() -> None:
    images = IMAGES[:20] / 16
    assert np.array_equal(rotate(images, 0), images)
    turned = rotate(images, 90)
    np.testing.assert_allclose(np.sort(turned.reshape(20, -1)), np.sort(images.reshape(20, -1)), atol=1e-12)
    np.testing.assert_allclose(rotate(rotate(turned, 90), 180), images, atol=1e-12)


@pytest.mark.parametrize("held_out", [0.0, 75.0])
def test_rotated_digits_have_the_documented_form(held_out: float) -> None:
    data = RotatedDigits(held_out).load(seed=1, num_workers=5)
    sizes = [n for a, n in zip((0, 15, 30, 45, 60, 75), [300] * 3 + [299] * 3, strict=True) if a != held_out]
    assert data.domains is not None
    assert torch.bincount(data.domains.domain).tolist() == [n // 5 for n in sizes]
    assert data.workers is not None
    assert torch.bincount(data.workers).tolist() == [n - n // 5 for n in sizes]
    assert len(data.test_x) == (300 if held_out == 0 else 299)
    assert len(data.x) + len(data.test_x) + len(data.domains.x) == 1797
    assert f"{held_out:g} degrees" == data.domains.held_out


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("FEDSIM_DATA", ""), "mnist").is_dir() or "FEDSIM_DATA" not in os.environ,
    reason="FEDSIM_DATA names no folder that holds mnist/",
)
def test_the_same_on_mnist() -> None:
    x, digit = grey("mnist")
    assert (x.shape, x.min(), x.max()) == ((60_000, 14, 14), 0, 1)
    raw = MNIST().load(0, 1).x[:, 0, ::2, ::2]
    assert np.corrcoef(raw.flatten().numpy(), x.ravel())[0, 1] == pytest.approx(1, abs=1e-6)
    colored = ColoredDigits(pictures="mnist", rows=100).load(seed=0, num_workers=2)
    assert colored.x.shape == (200, 2, 14, 14)
    rotated = RotatedDigits(pictures="mnist", angles=(0.0, 90.0), held_out=90.0).load(seed=0, num_workers=1)
    assert rotated.test_x.shape == (30_000, 1, 14, 14)
    assert len(digit) == 60_000


# ------------------------------------------------------------------------------------- how domains differ


def test_shifts_of_tables_by_hand() -> None:
    apart = shift(np.array([[1, 1], [0, 0]]), np.array([[0, 0], [1, 1]]))
    assert apart == (1, 0)
    assert shift(np.eye(2), np.eye(2)) == (0, 0)
    assert shift(np.eye(2), np.eye(2)[::-1]) == (0, 1)
    half = shift(np.array([[1, 1], [1, 1], [0, 0]]), np.array([[1, 1], [0, 0], [1, 1]]))
    assert half == (0.5, 0)
    with pytest.raises(ValueError, match="must be two of the same"):
        shift(np.ones((2, 2)), np.ones((3, 2)))


def test_colours_are_a_correlation_shift_by_the_difference_of_their_rates() -> None:
    training, _, outside = ColoredDigits().environments(seed=0)
    label, colour = (np.concatenate([getattr(e, k) for e in (*training, outside)]) for k in ("y", "colour"))
    diversity, correlation = between_workers(colour, label, np.repeat([0, 1, 2], 2000))
    assert np.abs(diversity).max() == 0
    assert correlation[0, 1] == pytest.approx(0.2, abs=1e-3)
    assert correlation[0, 2] == pytest.approx(0.6, abs=1e-3)
    assert correlation[1, 2] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    ("data", "partition", "diverse", "correlated"),
    [
        ("Digits()", "IID()", False, False),
        ("Digits()", "ByQuantity(sigma=0.5)", False, False),
        ("Digits()", "Pathological(classes=2)", True, False),
        ("Shifted(Digits(), noise=60.0)", "Natural()", True, False),
        ("Shifted(Digits(), exchange=10)", "Natural()", False, True),
    ],
)
def test_each_kind_of_shift_is_measured_as_such(
    data: str, partition: str, diverse: bool, correlated: bool
) -> None:
    given = {**TINY, "data": data, "partition": partition, "objective": "CrossEntropy()"}
    federation = load(Experiment.from_mapping(given))
    order, owner = federation.train.order, np.repeat([0, 1], federation.train.sizes)
    rows = federation.dataset.x[order]
    # Labels shift the features of classes as such; the others are seen by how far a row is from the middle.
    label = federation.dataset.y[order].numpy()
    far = (rows.flatten(1).square().mean(1).sqrt() * 2).round().long().numpy()
    feature = label if "Pathological" in partition else far if "noise" in data else clusters(rows.numpy(), 10)
    diversity, correlation = (table[0, 1] for table in between_workers(feature, label, owner))
    assert (diversity > 0.5) == diverse
    assert (diversity < 0.05) != diverse
    assert (correlation > 0.5) == correlated


def test_shifted_rows_are_those_of_the_source() -> None:
    plain, shifted = Digits().load(0, 4), Shifted(Digits(), exchange=3).load(0, 4)
    assert torch.equal(plain.x, shifted.x)
    assert shifted.workers is not None
    for i in range(4):
        own = shifted.workers == i
        pairs = {(a, b) for a, b in zip(plain.y[own].tolist(), shifted.y[own].tolist(), strict=True)}
        assert len(pairs) == 10
        assert sum(a != b for a, b in pairs) == 3
    noisy = Shifted(Digits(), noise=4.0).load(0, 4)
    assert noisy.workers is not None
    for i in range(4):
        added = (noisy.x - plain.x)[noisy.workers == i]
        assert added.var().item() == pytest.approx(i + 1, rel=0.05)
    with pytest.raises(ValueError, match="exchange = 11 must be at most the classes of digits, 10"):
        Shifted(Digits(), exchange=11).load(0, 2)

"""Sources of data: what they give, the cache, and bad input."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedsim.data import (
    CIFAR10,
    MNIST,
    Dataset,
    Digits,
    Folder,
    Hub,
    Synthetic,
    TinyShakespeare,
    TinyStories,
    hub,
    sources,
)
from fedsim.data.byte_pairs import BytePairs
from fedsim.data.columns import Columns
from fedsim.data.text import windows

REAL = Path(os.environ.get("FEDSIM_DATA", ""))


def real(name: str) -> pytest.MarkDecorator:
    here = "FEDSIM_DATA" in os.environ and (REAL / name).is_dir()
    return pytest.mark.skipif(not here, reason=f"FEDSIM_DATA names no folder that holds {name}/")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDSIM_CACHE", str(folder))
    return folder


def same(a: Dataset, b: Dataset) -> bool:
    pairs = ((a.x, b.x), (a.y, b.y), (a.test_x, b.test_x), (a.test_y, b.test_y))
    return all(torch.equal(*pair) for pair in pairs) and (a.labels, a.task) == (b.labels, b.task)


# --- digits ----------------------------------------------------------------------------------------------------


def test_digits_have_the_documented_form() -> None:
    data = Digits().load(seed=0, num_workers=10)
    assert data.x.shape == (1347, 1, 8, 8)
    assert data.test_x.shape == (450, 1, 8, 8)
    assert data.input_shape == (1, 8, 8)
    assert (data.x.dtype, data.y.dtype) == (torch.float32, torch.int64)
    assert (data.num_outputs, data.task, data.name, len(data.labels)) == (10, "classes", "digits", 10)


def test_digits_are_standardised_over_all_entries_of_the_training_rows() -> None:
    data = Digits().load(seed=0, num_workers=10)
    assert data.x.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert data.x.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_digits_of_both_parts_are_all_digits() -> None:
    data = Digits(test=0.3).load(seed=3, num_workers=1)
    together = torch.cat([data.x, data.test_x]).reshape(1797, 64).double()
    pixels, target = map(torch.from_numpy, load_digits(return_X_y=True))
    low, high = together.min(), together.max()
    restored = ((together - low) / (high - low) * 16).round()
    labelled = torch.cat([restored, torch.cat([data.y, data.test_y])[:, None]], 1)
    expected = torch.cat([pixels, target[:, None]], 1)
    assert sorted(map(tuple, labelled.tolist())) == sorted(map(tuple, expected.tolist()))


def test_the_split_of_digits_depends_on_the_seed_alone() -> None:
    assert same(Digits().load(0, 10), Digits().load(0, 500))
    assert not same(Digits().load(0, 10), Digits().load(1, 10))


def test_digits_without_a_test_set() -> None:
    data = Digits(test=0).load(0, 1)
    assert (len(data.x), len(data.test_x)) == (1797, 0)


# --- synthetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", [1.0, 2.0])
def test_two_gaussian_classes_have_the_bayes_error_phi_of_half_their_distance(difficulty: float) -> None:
    data = Synthetic(rows=40_000, features=5, classes=2, difficulty=difficulty, test=0.5).load(0, 1)
    fitted = LinearDiscriminantAnalysis().fit(data.x, data.y)
    error = 1 - float(fitted.score(data.test_x, data.test_y))
    bayes = norm.cdf(-2 / difficulty)
    # 5 standard errors of a share of 20,000 rows
    assert abs(error - bayes) < 5 * math.sqrt(bayes * (1 - bayes) / 20_000)


def test_gaussian_classes_are_equally_far_apart_and_equally_frequent() -> None:
    data = Synthetic(rows=50_000, features=6, classes=5, difficulty=0.5, test=0).load(0, 1)
    assert torch.bincount(data.y).tolist() == [10_000] * 5
    means = torch.stack([data.x[data.y == k].double().mean(0) for k in range(5)])
    apart = torch.pdist(means)
    # each entry of a mean errs by 1 / 100
    assert (apart - 8).abs().max() < 5 * math.sqrt(2) / 100


def test_synthetic_depends_on_the_seed_alone() -> None:
    source = Synthetic(rows=100, features=3, classes=4)
    assert same(source.load(0, 1), source.load(0, 9))
    assert not same(source.load(0, 1), source.load(1, 1))
    assert (len(source.load(0, 1).x), len(source.load(0, 1).test_x)) == (80, 20)


# --- text ------------------------------------------------------------------------------------------------------


def test_windows_of_a_short_text() -> None:
    data = windows("abcabca", "cbxab", context=2, rows=None, name="abc")
    assert data.labels == ("a", "b", "c")
    assert data.x.tolist() == [[0, 1], [2, 0], [1, 2]]
    assert data.y.tolist() == [[1, 2], [0, 1], [2, 0]]
    assert data.test_x.tolist() == [[2, 1]]  # of cbab: x is no character of the training text
    assert data.test_y.tolist() == [[1, 0]]
    assert (data.task, data.num_outputs) == ("tokens", 3)


def test_windows_split_a_single_text_nine_to_one() -> None:
    text = "0123456789" * 20
    data = windows(text, None, context=4, rows=None, name="digits")
    assert data.x.flatten().tolist() == [int(c) for c in text[: 44 * 4]]
    assert data.test_x.flatten().tolist() == [int(c) for c in text[180 : 180 + 16]]


def test_windows_stay_within_a_worker() -> None:
    owner = np.array([0] * 5 + [1] * 6)
    data = windows("aaaaabbbbbb", "ab", context=2, rows=None, name="two", worker_of_character=owner)
    assert data.x.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert data.workers is not None
    assert data.workers.tolist() == [0, 0, 1, 1]


def test_first_windows() -> None:
    data = windows("ab" * 100, None, context=3, rows=10, name="ab")
    assert (len(data.x), len(data.test_x)) == (10, 2)


@pytest.mark.parametrize(("context", "rows"), [(180, None), (2, 90)])
def test_too_little_text(context: int, rows: int | None) -> None:
    message = "context = 180 leaves no window" if rows is None else "rows = 90 is larger than the 89 windows"
    with pytest.raises(ValueError, match=message):
        windows("ab" * 100, None, context=context, rows=rows, name="ab")


SAID = "First Citizen:\n  Before we  proceed any further, hear me speak.\n\n\nAll:\nSpeak, speak. " * 3


def test_pieces_of_words_join_to_the_text_and_begin_where_they_say() -> None:
    pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    pairs = BytePairs(SAID, 60)
    tokens, starts = pairs.encode(SAID)
    pieces = [pairs.pieces[i] for i in tokens]
    assert "".join(pieces) == SAID
    assert all(SAID.startswith(piece, i) for piece, i in zip(pieces, starts, strict=True))
    assert len(pairs.pieces) == 60
    assert len(tokens) < len(SAID)
    assert len(pairs.encode("")[0]) == 0
    assert [pairs.pieces[i] for i in pairs.encode("s\u00e9")[0]] == ["s"]


def test_the_most_frequent_pair_is_joined_first() -> None:
    pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    assert BytePairs("abab abc bc", 5).pieces == (" ", "a", "b", "c", "ab")


def test_as_many_pieces_as_characters_are_the_characters() -> None:
    pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    size = len(set(SAID[: int(0.9 * len(SAID))]))
    pieces, characters = (windows(SAID, None, context=5, rows=20, name="a", vocabulary=v) for v in (size, 0))
    assert pieces.labels == characters.labels
    for name in ("x", "y", "test_x", "test_y"):
        assert torch.equal(getattr(pieces, name), getattr(characters, name))


def test_windows_of_pieces_stay_within_a_worker() -> None:
    pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    owner = np.array([0] * 6 + [1] * 8)
    # The pieces are aa and four times " aa", which begin at 0, 2, 5, 8, 11: the second window has two workers.
    data = windows(
        "aa " * 4 + "aa", "aa", context=2, rows=None, name="two", vocabulary=4, worker_of_character=owner
    )
    assert data.workers is not None
    assert data.workers.tolist() == [0]
    assert [data.labels[i] for i in data.x[0].tolist()] == ["aa", " aa"]
    assert [data.labels[i] for i in data.y[0].tolist()] == [" aa", " aa"]


@pytest.mark.parametrize("installed", [True, False])
def test_bad_vocabularies_are_one_line(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"^vocabulary = 3 must be 0, or at least the \d+ characters of the text$"
    if installed:
        pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    else:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        message = r"^a byte-pair vocabulary needs tokenizers: install the extra fedsim\[text\], or set vocabulary = 0$"
    with pytest.raises(ValueError if installed else ModuleNotFoundError, match=message):
        windows(SAID, None, context=4, rows=None, name="said", vocabulary=3)


# --- folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folders train/ and test/ with a folder for each of two classes, grey 4x3 pictures."""
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    image = pytest.importorskip("PIL.Image", reason="needs the extra fedsim[data]")
    root = tmp_path / "shapes"
    for split, number in (("train", 6), ("test", 2)):
        for k, name in enumerate(("flat", "round")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.full((3, 4), 10 * i + 100 * k, dtype=np.uint8)
                image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def table(path: Path, **columns: Any) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)


def test_folder_of_pictures(pictures: Path) -> None:
    data = Folder(str(pictures)).load(0, 1)
    assert data.x.shape == (12, 1, 3, 4)
    assert data.test_x.shape == (4, 1, 3, 4)
    assert (data.labels, data.num_outputs, data.task, data.name) == (
        ("flat", "round"),
        2,
        "classes",
        "shapes",
    )
    raw = torch.tensor([10.0 * i + 100 * k for k in range(2) for i in range(6)]) / 255
    order = data.x[:, 0, 0, 0].argsort()
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(data.x[order, 0, 1, 2], expected)
    assert data.y[order].tolist() == [0] * 6 + [1] * 6
    assert sorted(data.test_x[:, 0, 0, 0].tolist()) == pytest.approx(expected[[0, 1, 6, 7]].tolist())


def test_coloured_pictures_are_standardised_per_colour(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    image = pytest.importorskip("PIL.Image", reason="needs the extra fedsim[data]")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3), dtype=np.uint8)
    pixels[..., 2] = 7
    for i, picture in enumerate(pixels):
        folder = tmp_path / "rgb" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(folder / f"{i}.png")
    data = Folder(str(tmp_path / "rgb"), test=None).load(0, 1)
    assert data.x.shape == (5, 3, 2, 2)
    torch.testing.assert_close(data.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.x.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]))


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets that were decoded so far."""
    seen: list[str] = []
    decode = Columns.decode

    def counted(self: Columns, *tables: Any) -> Any:
        seen.append(self.name)
        return decode(self, *tables)

    monkeypatch.setattr(Columns, "decode", counted)
    return seen


def test_pictures_are_decoded_once(pictures: Path, decodes: list[str]) -> None:
    first = Folder(str(pictures)).load(0, 1)
    again = Folder(str(pictures)).load(1, 2)
    assert decodes == ["shapes"]
    assert same(first, again)


@pytest.mark.parametrize("damage", ["cut off", "one byte", "no header"])
def test_a_broken_cache_is_rebuilt(pictures: Path, cache: Path, decodes: list[str], damage: str) -> None:
    first = Folder(str(pictures)).load(0, 1)
    (path,) = cache.glob("shapes-*.safetensors")
    body = bytearray(path.read_bytes())
    if damage == "one byte":
        body[-1] ^= 1
    path.write_bytes({"cut off": body[:-9], "one byte": body, "no header": b"what"}[damage])
    assert same(first, Folder(str(pictures)).load(0, 1))
    assert same(first, Folder(str(pictures)).load(0, 1))
    assert decodes == ["shapes"] * 2


def test_the_cache_follows_the_contents(pictures: Path, decodes: list[str]) -> None:
    first = Folder(str(pictures)).load(0, 1)
    (pictures / "train" / "flat" / "0.png").write_bytes((pictures / "train" / "round" / "5.png").read_bytes())
    assert not same(first, Folder(str(pictures)).load(0, 1))
    assert decodes == ["shapes"] * 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="shapes is not cached: .*FEDSIM_CACHE"):
        assert len(Folder(str(pictures)).load(0, 1).x) == 12


def test_first_rows_of_a_folder(pictures: Path) -> None:
    data = Folder(str(pictures), rows=5).load(0, 1)
    assert (len(data.x), len(data.test_x), data.num_outputs) == (5, 4, 2)
    with pytest.raises(ValueError, match="rows = 13 is larger than the 12 training rows"):
        Folder(str(pictures), rows=13).load(0, 1)


def test_pictures_of_unequal_size(pictures: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("L", (9, 3)).save(pictures / "train" / "round" / "9.png")
    with pytest.raises(ValueError, match="picture 12 is 9x3, the first is 4x3: make them one size"):
        Folder(str(pictures)).load(0, 1)


def test_table_of_numbers(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    x = np.random.default_rng(0).normal(3, 2, (6, 2))
    table(
        tmp_path / "t" / "train.parquet",
        a=x[:, 0],
        b=x[:, 1],
        label=[*"bbacab"],
        farm=[*"kjkjkj"],
        note=[*"123456"],
    )
    table(tmp_path / "t" / "test.parquet", a=[3.0], b=[3.0], label=["a"], farm=["k"], note=["7"])
    data = Folder(str(tmp_path / "t"), worker="farm").load(0, 1)
    torch.testing.assert_close(data.x, torch.from_numpy((x - x.mean(0)) / x.std(0)).float())
    assert (data.labels, data.y.tolist(), data.test_y.tolist()) == (("a", "b", "c"), [1, 1, 0, 2, 0, 1], [0])
    assert data.workers is not None
    assert data.workers.tolist() == [1, 0, 1, 0, 1, 0]


def test_whole_numbers_as_labels_keep_their_order(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    table(tmp_path / "n" / "train.parquet", x=[[1.0], [2.0], [3.0]], y=[10, 9, 100])
    table(tmp_path / "n" / "test.parquet", x=[[1.0], [2.0]], y=[100, 10])
    data = Folder(str(tmp_path / "n")).load(0, 1)
    assert (data.labels, data.y.tolist(), data.test_y.tolist()) == (("9", "10", "100"), [1, 0, 2], [2, 1])


def test_float_labels_are_a_regression(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    table(tmp_path / "r" / "train.parquet", features=[[1.0, 2.0], [3.0, 5.0]], target=[0.5, -1.5])
    data = Folder(str(tmp_path / "r"), test=None).load(0, 1)
    assert (data.task, data.num_outputs, data.y.tolist()) == ("regression", 1, [0.5, -1.5])
    assert data.x.tolist() == [[-1, -1], [1, 1]]
    assert data.test_x.shape == (0, 2)


def test_folder_of_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    (tmp_path / "t").mkdir()
    text = "to be or not\nto be\n\nthat is\n" * 9
    (tmp_path / "t" / "input.txt").write_text(text)
    data = Folder(str(tmp_path / "t"), context=5).load(0, 1)
    assert same(data, windows(text.rstrip("\n"), None, context=5, rows=None, name="t"))
    few = Folder(str(tmp_path / "t"), context=5, rows=3).load(0, 1)
    assert "".join(few.labels[i] for i in few.x.flatten()) == text[:15]


def test_folder_of_text_in_pieces(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra fedsim[text]")
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    (tmp_path / "t").mkdir()
    text = "to be or not\nto be\n\nthat is\n" * 40
    (tmp_path / "t" / "input.txt").write_text(text)
    data = Folder(str(tmp_path / "t"), context=5, vocabulary=20).load(0, 1)
    assert same(data, windows(text.rstrip("\n"), None, context=5, rows=None, name="t", vocabulary=20))
    few = Folder(str(tmp_path / "t"), context=5, rows=3, vocabulary=20).load(0, 1)
    assert len(few.x) == 3
    assert text.startswith("".join(few.labels[i] for i in few.x.flatten()))


def test_text_of_natural_workers(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    table(tmp_path / "t" / "train.parquet", text=["bb", "aaaa", "bbb"], who=["y", "x", "y"])
    table(tmp_path / "t" / "test.parquet", text=["abab"], who=["x"])
    data = Folder(str(tmp_path / "t"), worker="who", context=2).load(0, 1)
    lines = ["".join(data.labels[i] for i in row) for row in data.x]
    assert lines == ["aa", "aa", "b\n", "bb"]  # of aaaa\n bb\n bbb\n; the window over both is left out
    assert data.workers is not None
    assert data.workers.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (
            {"image": [[1.0]], "text": ["a"]},
            {},
            "no label column found, there are image, text: name one, label=",
        ),
        ({"x": [[1.0]], "y": [1]}, {"label": "klass"}, "label = 'klass' is not a column, there are x, y"),
        ({"x": [[1.0]], "y": [1]}, {"input": "z"}, "input = 'z' is not a column, there are x, y"),
        ({"x": [[1.0]], "y": [1]}, {"worker": "z"}, "column = 'z' is not a column, there are x, y"),
        ({"y": [1]}, {}, "no input column found, there are y: name one, input="),
        ({"x": [[1.0], [2.0]], "y": [1, None]}, {}, "row 1 of column 'y' is empty"),
        (
            {"x": [[1.0], [2.0, 3.0]], "y": [1, 0]},
            {},
            "must hold pictures, text or lists of numbers of one length",
        ),
        ({"x": [[1.0]], "y": [[1]]}, {}, "column 'y' holds lists: one label a row is needed"),
        ({"x": [[1.0]], "y": [1]}, {"test": "validation"}, "split 'validation' of"),
        ({"x": [[1.0]], "y": [1]}, {"train": "trian"}, "split 'trian' of"),
    ],
)
def test_bad_folders(tmp_path: Path, columns: dict, arguments: dict, message: str) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    table(tmp_path / "t" / "train.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        Folder(str(tmp_path / "t"), **{"test": None, **arguments}).load(0, 1)


def test_a_folder_without_a_test_split_says_how_to_go_on(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    table(tmp_path / "t" / "train.parquet", x=[[1.0]], y=[1])
    with pytest.raises(ValueError, match="test=None goes without a test set") as caught:
        Folder(str(tmp_path / "t")).load(0, 1)
    assert "\n" not in str(caught.value)


def test_a_label_that_only_the_test_rows_have(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    table(tmp_path / "t" / "train.parquet", x=[[1.0]], y=["a"])
    table(tmp_path / "t" / "test.parquet", x=[[1.0]], y=["b"])
    with pytest.raises(ValueError, match="label 'b' of the test rows is not in the training rows"):
        Folder(str(tmp_path / "t")).load(0, 1)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    with pytest.raises(ValueError, match="path = '/no/such/place' is not a folder"):
        Folder("/no/such/place").load(0, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Folder: split 'train' of .*empty"):
        Folder(str(tmp_path / "empty")).load(0, 1)


# --- the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)
    monkeypatch.delenv("FEDSIM_DATA", raising=False)


def test_hub_reads_splits_and_columns(monkeypatch: pytest.MonkeyPatch, decodes: list[str]) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    splits = {
        "train": datasets.Dataset.from_dict({
            "x": [[1.0], [3.0]],
            "fine_label": [1, 0],
            "writer": ["p", "o"],
        }),
        "validation": datasets.Dataset.from_dict({"x": [[5.0]], "fine_label": [1], "writer": ["o"]}),
    }
    asked = []

    def load_dataset(path: str, config: str | None, split: str, cache_dir: str | None) -> Any:
        asked.append((path, config, split))
        return splits[split]

    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Hub("some/thing", config="small", test="validation", worker="writer")
    data = source.load(0, 1)
    assert asked == [("some/thing", "small", "train"), ("some/thing", "small", "validation")]
    assert (data.x.tolist(), data.y.tolist(), data.test_x.tolist()) == ([[-1], [1]], [1, 0], [[3]])
    assert data.workers is not None
    assert data.workers.tolist() == [1, 0]
    assert same(data, source.load(0, 1))
    assert decodes == ["some/thing"]


def test_hub_offline_is_one_line_and_leaves_the_library_as_it_was(offline: None) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    before = bool(datasets.config.HF_HUB_OFFLINE)
    with pytest.raises(
        ConnectionError, match="'nobody/nothing' was not downloaded earlier: connect once"
    ) as caught:
        Hub("nobody/nothing").load(0, 1)
    assert "\n" not in str(caught.value)
    assert bool(datasets.config.HF_HUB_OFFLINE) == before


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        (MNIST(), "mnist"),
        (CIFAR10(), "cifar10"),
        (TinyShakespeare(), "tinyshakespeare"),
        (TinyStories(), "tinystories"),
    ],
    ids=repr,
)
def test_short_names_offline_say_both_ways(
    offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Any, folder: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedsim[data]")

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise urllib.error.URLError("no network")

    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("a long story\nof two lines")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for value, where in (
        (None, "FEDSIM_DATA is not set"),
        (str(tmp_path), f"no folder {folder} in FEDSIM_DATA = "),
    ):
        if value is not None:
            monkeypatch.setenv("FEDSIM_DATA", value)
        with pytest.raises(ConnectionError, match=where) as caught:
            source.load(0, 1)
        assert f"set FEDSIM_DATA to a folder that holds {folder}/, or connect once" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_short_names_read_fedsim_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: None) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    table(tmp_path / "tinystories" / "train.parquet", text=["once", "upon a time"])
    table(tmp_path / "tinystories" / "validation.parquet", text=["a time upon"])
    if importlib.util.find_spec("tokenizers") is not None:
        pieces = TinyStories(context=1, rows=4, vocabulary=13).load(0, 1)
        assert pieces.num_outputs == 13
        assert "once\nupon".startswith("".join(pieces.labels[i] for i in pieces.x.flatten()))
    data = TinyStories(context=3, rows=4).load(0, 1)
    assert "".join(data.labels[i] for i in data.x.flatten()) == "once\nupon a "
    assert "".join(data.labels[i] for i in data.test_x.flatten()) == "a t"
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be" * 9)
    assert TinyShakespeare(context=6).load(0, 1).labels == tuple(" benort")


# --- real data -------------------------------------------------------------------------------------------------


@real("mnist")
def test_mnist() -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    data = MNIST(rows=500).load(0, 1)
    assert (data.x.shape, data.test_x.shape) == ((500, 1, 28, 28), (10_000, 1, 28, 28))
    assert torch.bincount(data.test_y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (data.name, data.labels) == ("mnist", tuple("0123456789"))


@real("cifar10")
def test_cifar10() -> None:
    pytest.importorskip("datasets", reason="needs the extra fedsim[data]")
    data = CIFAR10(rows=500).load(0, 1)
    assert (data.x.shape, data.test_x.shape) == ((500, 3, 32, 32), (10_000, 3, 32, 32))
    assert torch.bincount(data.test_y).tolist() == [1000] * 10
    assert data.labels[:3] == ("airplane", "automobile", "bird")
    torch.testing.assert_close(data.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


@real("tinyshakespeare")
def test_tinyshakespeare() -> None:
    data = TinyShakespeare(context=32).load(0, 1)
    text = (REAL / "tinyshakespeare" / "input.txt").read_text()
    assert data.num_outputs == len(set(text)) == 65
    assert "".join(data.labels[i] for i in data.x[:3].flatten()) == text[:96]
    assert torch.equal(data.x.flatten()[1:], data.y.flatten()[:-1])
    assert len(data.x) + len(data.test_x) == (int(0.9 * len(text)) - 1) // 32 + (len(text) // 10 - 1) // 32


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(test=1.0), r"Digits: test = 1.0 must be in \[0, 1\)"),
        (lambda: Synthetic(rows=0), "Synthetic: rows = 0 must be >= 1"),
        (lambda: Synthetic(features=0), "features = 0 must be >= 1"),
        (lambda: Synthetic(classes=1), "classes = 1 must be >= 2"),
        (lambda: Synthetic(difficulty=0), "difficulty = 0 must be > 0"),
        (lambda: Synthetic(test=-0.1), r"test = -0.1 must be in \[0, 1\)"),
        (lambda: MNIST(rows=0), "MNIST: rows = 0 must be >= 1"),
        (lambda: CIFAR10(rows=-1), "CIFAR10: rows = -1 must be >= 1"),
        (lambda: TinyShakespeare(context=0), "TinyShakespeare: context = 0 must be >= 1"),
        (lambda: TinyStories(rows=0), "TinyStories: rows = 0 must be >= 1"),
        (lambda: Hub("a/b", rows=0), "Hub: rows = 0 must be >= 1"),
        (lambda: Folder(".", context=0), "Folder: context = 0 must be >= 1"),
        (lambda: Folder(".", vocabulary=-1), "Folder: vocabulary = -1 must be >= 0"),
        (lambda: TinyShakespeare(vocabulary=-1), "TinyShakespeare: vocabulary = -1 must be >= 0"),
        (lambda: TinyStories(vocabulary=-1), "TinyStories: vocabulary = -1 must be >= 0"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "ranking"}, "task = 'ranking' must be one of classes, binary, regression, tokens"),
        ({"y": torch.zeros(4).long()}, "x has 5 rows, y has 4"),
        ({"test_y": torch.zeros(1).long()}, "test_x has 0 rows, test_y has 1"),
        ({"test_x": torch.zeros(0, 3)}, r"rows of x are \(2,\), of test_x \(3,\)"),
        ({"workers": torch.zeros(3)}, r"workers has shape \(3,\), must be \(5,\)"),
    ],
)
def test_bad_data_sets(change: dict, message: str) -> None:
    x, y = torch.zeros(5, 2), torch.zeros(5).long()
    good = {
        "x": x,
        "y": y,
        "test_x": x[:0],
        "test_y": y[:0],
        "num_outputs": 2,
        "task": "classes",
        "name": "n",
    }
    with pytest.raises(ValueError, match=message):
        Dataset(**{**good, **change})

"""Which picture shows the scene of an image under other conditions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluda_cli.commands.prepare import prepare
from cluda_cli.data.index import Index
from cluda_cli.errors import DataError, SettingsError
from cluda_cli.preparation.pairing import Split, find_pairs
from cluda_cli.preparation.problems import Kind


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def find(root: Path, pairs: str | None = None) -> tuple[dict[str, str | None], list[Kind]]:
    split = Split("train", "night/*.png", references="day/**/*.png", pairs=pairs, required=True)
    found = find_pairs(root, [split])
    return {pair.image: pair.reference for pair in found.pairs}, [problem.kind for problem in found.problems]


def test_names_pair_as_they_pair_labels(tmp_path: Path) -> None:
    make(tmp_path, "night/a.png", "night/b.png", "day/a.png", "day/c.png")
    assert find(tmp_path) == ({"night/a.png": "day/a.png", "night/b.png": None}, [Kind.NO_REFERENCE])


def test_a_paired_picture_is_no_image(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "a_day.png")
    found = find_pairs(tmp_path, [Split("train", "*.png", references="*_day.png", required=True)])
    assert [(pair.image, pair.reference) for pair in found.pairs] == [("a.png", "a_day.png")]


@pytest.mark.parametrize("line", ["night/a.png,day/s1/x.png", "a,s1/x", "root/night/a , x.png", "night\\a,day\\s1\\x"])
def test_lists_pair_what_names_do_not(tmp_path: Path, line: str) -> None:
    make(tmp_path, "night/a.png", "night/x.png", "day/s1/x.png")
    (tmp_path / "pairs.csv").write_text(line + "\n\nunknown,x\n")
    assert find(tmp_path, "*.csv")[0] == {"night/a.png": "day/s1/x.png", "night/x.png": None}


def test_a_name_for_several_pictures_is_not_guessed_at(tmp_path: Path) -> None:
    make(tmp_path, "night/a.png", "day/s1/x.png", "day/s2/x.png")
    (tmp_path / "pairs.csv").write_text("a,x\n")
    assert find(tmp_path, "*.csv") == ({"night/a.png": None}, [Kind.NO_PAIR])


def test_a_list_of_another_form_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "night/a.png", "day/a.png")
    (tmp_path / "pairs.csv").write_text("a,a\na;a\n")
    with pytest.raises(DataError, match=r"pairs\.csv: line 2 has 1 columns"):
        find(tmp_path, "*.csv")


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A description whose two images have paired pictures."""
    for name in ("night/a", "night/b", "day/a", "day/b"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 10, 3), len(name), dtype=np.uint8)).save(path)
    text = '[splits.train]\nimages = "night/*.png"\nreferences = "day/*.png"\n'
    (tmp_path / "dusk.toml").write_text(text)
    return tmp_path / "dusk.toml"


def test_prepare_keeps_the_pairs_of_a_description(described: Path, tmp_path: Path) -> None:
    (index,) = prepare(str(described), tmp_path / "data")
    assert index.references == {"night/a.png": "day/a.png", "night/b.png": "day/b.png"}
    read = Index.load(tmp_path / "data/prepared/dusk")
    assert read.references == index.references and read.fingerprint == index.fingerprint
    described.write_text('[splits.train]\nimages = "night/*.png"\n')
    (plain,) = prepare(str(described), tmp_path / "data")
    assert not plain.references and plain.fingerprint != index.fingerprint


def test_a_paired_picture_of_another_size_is_an_error(described: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(np.zeros((8, 9, 3), dtype=np.uint8)).save(tmp_path / "day/b.png")
    with pytest.raises(DataError, match="would spoil training"):
        prepare(str(described), tmp_path / "data")
    assert "paired pictures of another size than their image: 1" in capsys.readouterr().out
    (index,) = prepare(str(described), tmp_path / "data", skip_bad=True)
    assert list(index.references) == ["night/a.png"]


def test_pairs_without_references_are_refused(described: Path, tmp_path: Path) -> None:
    described.write_text('[splits.train]\nimages = "night/*.png"\npairs = "*.csv"\n')
    with pytest.raises(SettingsError, match=r"splits\.train\.pairs: needs splits\.train\.references"):
        prepare(str(described), tmp_path / "data")


def test_pictures_of_other_names_are_an_error(described: Path, tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / f"day/{name}.png").rename(tmp_path / f"day/{name}{name}x.png")
    with pytest.raises(DataError, match="would spoil training"):
        prepare(str(described), tmp_path / "data")
    assert "images are named like a, pictures like aax" in capsys.readouterr().out

"""The verb `report`: one HTML file that needs nothing else."""

import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cluda_cli.commands.report import report
from cluda_cli.errors import DataError

write_run = runpy.run_path(str(Path(__file__).parents[1] / "measure" / "test_comparison.py"))["write_run"]


@pytest.fixture
def folders(tmp_path):
    scores = {"source-only": (40.0, 42.0), "daformer": (45.0, 48.0)}
    made = [
        write_run(tmp_path / f"{n}-seed={s}", n, s, (1.0, v)) for n, two in scores.items() for s, v in enumerate(two)
    ]
    for folder in made:
        with (folder / "metrics.jsonl").open("a") as file:
            for step in (10, 20):
                terms = {"source/source": 1 / step, "mixed/mixed": None}
                file.write(json.dumps({"step": step, "lr": 1e-3, "terms": terms}) + "\n")
    return made


class Page(HTMLParser):
    """Texts of the cells of every row, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in {"src", "href", "srcset"}]
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in {"td", "th"}

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def test_the_page_shows_means_classes_curves_and_settings(folders, tmp_path, capsys):
    report(folders, out=tmp_path / "new" / "report.html", baseline=folders[0])
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "report.html")
    page = Page(text)
    assert ["2: daformer", "45.50 ± 2.12", "46.50 ± 2.12", "46.50 ± 2.12", "+5.50 ± 0.50", "0.058"] in page.rows
    assert any(row[0] == "road" and row[1] == "41.00 ± 1.41" for row in page.rows)
    assert ["objectives.mixed.weight", "unset", "1.0"] in page.rows
    for title in ("mIoU, percent", "loss source/source", "loss mixed/mixed", "learning rate of the encoder"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "Nothing was measured." in text  # mixed/mixed


def test_the_page_loads_nothing(folders, tmp_path):
    for folder in folders[:1]:
        (folder / "pictures").mkdir()
        Image.new("RGB", (3000, 30), (200, 10, 10)).save(folder / "pictures" / "000020.png")
    report(folders, out=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    loaded = Page(text).loaded
    assert len(loaded) == 1
    assert loaded[0].startswith("data:image/jpeg;base64,")
    assert not re.search(r"https?://|<script|@import|url\(", text)


def test_names_are_escaped(tmp_path):
    folder = write_run(tmp_path / "<b>run")
    report([folder], out=tmp_path / "report.html", title="<i>&")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in text and "<i>" not in text
    assert "&lt;b&gt;run" in text


def test_a_damaged_line_of_losses_is_named(folders, tmp_path):
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lr": 1, "terms": {"source/source": "x"}}\n')
    with pytest.raises(DataError, match="line 6 is damaged"):
        report(folders, out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()

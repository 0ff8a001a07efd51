"""Every command that the README and the pages show is run, in their order, on tiny data."""

import itertools
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from cluda_cli import presets
from cluda_cli.adaptation.views import View
from cluda_cli.cli import app
from cluda_cli.data.labels import CITYSCAPES, IGNORE
from cluda_cli.demo.dataset import make_demo
from cluda_cli.models.segmenter import Output
from cluda_cli.preparation.published import PUBLISHED

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
# The README comes first: later pages use the datasets and runs that its commands make.
PAGES = ["README.md", *sorted(p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob("docs/**/*.md"))]
# Laid over every shown `train` and `bench`, so that it takes seconds; the method stays the one that is shown.
TINY = [
    *("data.crop=[48,64]", "data.source_box=[48,80]", "data.target_box=[48,80]", "data.workers=0"),
    *("data.target_margins=[0,0,0,0]", "model.encoder=mobilenetv2_050", "model.weights=false"),
    *("model.decoder.embed_dim=8", "model.decoder.channels=8", "objectives.feature_distance=false"),
    *("training.steps=1", "training.device=cpu"),
]


def shown_commands(page: str) -> list[str]:
    """Lines of fenced blocks without a language that begin with `cluda`; continued in the order of the page."""
    blocks = re.findall(r"^```\n(.*?)^```", (REPOSITORY / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("cluda ")]


def table(page: str, heading: str) -> list[list[str]]:
    """The cells, without backticks, of a table of a page in docs/ whose first line begins with `heading`."""
    lines = (DOCS / page).read_text(encoding="utf-8").partition(heading)[2].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def first_cells(page: str, heading: str) -> set[str]:
    return {cells[0] for cells in table(page, heading)}


def write_pair(image: Path, label: Path, seed: int, label_ids: list[int]) -> None:
    draw = np.random.default_rng(seed)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    blocks = draw.choice(label_ids, (6, 10)).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
    Image.fromarray(draw.integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(image)
    picture = Image.fromarray(blocks)
    if "gta" in label.parts:
        picture = picture.convert("P")
        picture.putpalette([value for value in range(256) for _ in range(3)])
        picture.putdata(blocks.flatten().tolist())
    picture.save(label)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as a user has it: raw GTA5 and Cityscapes, own data with a description, pictures to segment."""
    monkeypatch.chdir(tmp_path)
    ids = [c.label_id for c in CITYSCAPES]
    data, own = Path("data"), Path("mycity")
    for i in range(3):
        write_pair(data / f"gta/images/{i:05d}.png", data / f"gta/labels/{i:05d}.png", i, ids)
        write_pair(own / f"train/images/{i}.jpg", own / f"train/labels/{i}.png", i, [0, 1, 2])
        write_pair(own / f"val/images/{i}.jpg", own / f"val/labels/{i}.png", i + 9, [0, 1, 2])
        write_pair(Path(f"images/{i}.png"), Path(f"unused/{i}.png"), i, ids)
        for split in ("train", "val"):
            stem = f"{split}/ulm/ulm_00000{i}_000019"
            image = data / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png"
            write_pair(image, data / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png", i, ids)
    (own / "train.txt").write_text("0\n1\n2\n")
    page = (DOCS / "how-to" / "prepare-data.md").read_text(encoding="utf-8")
    Path("mycity.toml").write_text(re.search(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE).group(1))
    make_demo(data / "demo", counts={"render": {"train": 4, "val": 1}, "camera": {"train": 4, "val": 2}})
    # The pages show the full-size demo; here a smaller one lies in its place and is left as it is.
    monkeypatch.setattr("cluda_cli.demo.dataset.make_demo", lambda folder: None)
    return tmp_path


def run(line: str) -> None:
    """Run one shown command; `&&` joins several. A `train` or `bench` is made tiny by the last settings."""
    for part in line.split(" && "):
        if part.startswith(("cluda train", "cluda bench")):
            part += "".join(f" --set {setting}" for setting in TINY)
        result = CliRunner().invoke(app, shlex.split(part)[1:])
        assert result.exit_code == 0, f"{part}: {result.stderr}"


@pytest.mark.slow
def test_every_shown_command_runs(workplace):
    done = set()
    for page in PAGES:
        for line in shown_commands(page):
            if line not in done:
                run(line)
                done.add(line)
    assert len(done) > 15
    verbs = {"prepare", "train", "bench", "pseudo-label", "eval", "predict", "presets"}
    assert {line.split()[1] for line in done} == verbs


def test_the_readme_names_what_ci_runs():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "pip install .\n" in readme
    assert "pip install '.[dev]' && pytest" in readme
    assert "pip install --quiet '.[dev]'\n" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_every_preset_is_in_the_readme():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in presets.names())


def links(page: Path) -> list[str]:
    """Targets of the links of a page, with their anchors."""
    return re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for link in links(path):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_an_index():
    indexes = [DOCS / "index.md", DOCS / "decisions" / "README.md"]
    listed = {(index.parent / link).resolve() for index in indexes for link in links(index)}
    assert {path.resolve() for path in DOCS.glob("**/*.md")} == listed | {indexes[0].resolve()}


def test_every_command_is_in_the_reference():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert commands == first_cells("reference/command-line.md", "| command |")


def test_every_dataset_is_in_the_page_on_data():
    assert {dataset.name for dataset in PUBLISHED} | {"demo"} == first_cells("how-to/prepare-data.md", "| name |")


def test_the_table_of_methods_is_true():
    rows = table("reference/presets.md", "| method |")
    methods = [name for name in presets.names() if not presets.header(name)[0].startswith("Overlay")]
    assert sorted(cells[0] for cells in rows) == methods
    for name, *cells in rows:
        s = presets.load([name])
        parts = [s.data.rare_class, s.objectives.mixed, s.objectives.masked, s.objectives.feature_distance]
        parts += [s.objectives.pixel_contrast, s.model.multires]
        assert cells == [s.model.encoder, str(s.data.crop[0]), *("on" if part else "-" for part in parts)], name


def test_the_worked_example_of_an_objective_is_sound():
    """The code of adding-an-objective.md: finite, connected, blind to ignored pixels, 0 without any labelled."""
    page = (DOCS / "how-to" / "adding-an-objective.md").read_text(encoding="utf-8")
    code = next(
        block for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "forward" in block
    )
    names = {
        "nn": nn,
        "F": F,
        "Tensor": Tensor,
        "Output": Output,
        "View": View,
        "IGNORE": IGNORE,
        "settings": SimpleNamespace(Entropy=None),
    }
    exec(code, names)  # noqa: S102  our own page
    objective = names["Entropy"](None)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[:, :4] = IGNORE
    view = View("mixed", torch.zeros(2, 3, 8, 8), label, torch.ones(2, 8, 8))
    value = objective(Output(logits, logits, (), view.image), view)
    value.backward()
    assert 0 < value <= math.log(3)
    assert not logits.grad[:, :, 0].any()
    assert logits.grad[:, :, 3].any()
    nothing = objective(Output(logits, logits, (), view.image), replace(view, label=torch.full_like(label, IGNORE)))
    assert nothing == 0
    assert nothing.requires_grad

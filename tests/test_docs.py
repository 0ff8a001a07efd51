"""Every command that the README and the pages show is run, in their order, on tiny data."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluda_cli import presets
from cluda_cli.cli import app
from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.demo.dataset import make_demo
from cluda_cli.preparation.published import PUBLISHED
from cluda_cli.settings import Objectives

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
# The README comes first: later pages use the datasets and runs that its commands make.
PAGES = ["README.md", *sorted(p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob("docs/**/*.md"))]
# Laid over every shown `train` and `bench`, so that it takes seconds; the method stays the one that is shown.
TINY = [
    *("data.crop=[48,64]", "data.source_box=[48,80]", "data.target_box=[48,80]", "data.workers=0"),
    *("data.target_margins=[0,0,0,0]", "model.encoder=test_efficientnet", "model.weights=false"),
    *("model.decoder.embed_dim=8", "model.decoder.channels=8", "objectives.feature_distance=false"),
    *("training.steps=1", "training.device=cpu"),
]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, "" for those without one, in the order of the page."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [block for name, block in found if name == language]


def shown_commands(page: str) -> list[str]:
    """Lines of fenced blocks without a language that begin with `cluda`; continued in the order of the page."""
    return [line for block in blocks(page, "") for line in block.splitlines() if line.startswith("cluda ")]


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
        if part.startswith("cluda train") and "--run" not in part:  # the folder that it has without what is added
            part += " --run runs/" + "-".join(re.findall(r"--preset (\S+)", part))
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
    verbs = {"prepare", "train", "compare", "report", "bench", "pseudo-label", "eval", "predict", "presets"}
    assert {line.split()[1] for line in done} == verbs


@pytest.mark.slow
def test_the_example_of_python_runs(workplace, monkeypatch):
    """The block of python.md, with the tiny settings laid over those that it loads."""
    (example,) = blocks("docs/how-to/python.md", "python")
    for dataset in ("gta", "cityscapes"):
        run(f"cluda prepare {dataset}")
    load = presets.load
    monkeypatch.setattr(presets, "load", lambda names, options, changes: load(names, options, [*changes, *TINY]))
    exec(compile(example, "python.md", "exec"), {})
    assert Path("overlay.png").is_file() and Path("labels.png").is_file()


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


def test_every_objective_is_in_the_table_of_methods():
    page = (DOCS / "reference" / "methods.md").read_text(encoding="utf-8")
    assert all(f"`objectives.{name}`" in page for name in Objectives.model_fields)
    named = {
        name for cells in table("reference/methods.md", "| method |") for name in re.findall(r"[a-z0-9-]+", cells[2])
    }
    assert named - {"-"} <= set(presets.names())


@pytest.mark.slow
def test_the_worked_example_of_an_objective_is_sound(tmp_path):
    """All four blocks of adding-an-objective.md, put where the page says, pass the contract test as it is."""
    page = "docs/how-to/adding-an-objective.md"
    section, file, choice = blocks(page, "python")
    (preset,) = blocks(page, "toml")
    package = copy_package(tmp_path)
    shutil.copy(REPOSITORY / "tests" / "objectives" / "test_contract.py", tmp_path)
    header = "class Objectives(Section):\n"
    own_class, _, field = section.partition(header + "    ...\n")
    page = package / "settings" / "objectives.py"
    insert(page, header, before=own_class)
    page.write_text(page.read_text(encoding="utf-8") + field, encoding="utf-8")
    (package / "objectives" / "entropy.py").write_text(file, encoding="utf-8")
    imported, _, condition = choice.partition("\n\n")
    chooser = package / "objectives" / "__init__.py"
    insert(chooser, "from torch import Tensor, nn\n", before=imported + "\n")
    insert(chooser, "    built = nn.ModuleDict(", before=condition)
    (tmp_path / "entropy.toml").write_text(preset, encoding="utf-8")
    code = "from cluda_cli import presets; assert presets.load(['entropy.toml']).objectives.entropy.weight == 0.01"
    run_python(tmp_path, "-c", code)
    contract = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "entropy", "test_contract.py"]
    assert int(re.search(r"(\d+) passed", run_python(tmp_path, *contract)).group(1)) >= 12


@pytest.mark.slow
def test_the_worked_examples_of_a_dataset_and_a_command_are_sound(tmp_path):
    """The blocks of extend.md, put where the page says: the command lists the classes of the dataset."""
    name, entry, verb, command = blocks("docs/how-to/extend.md", "python")
    package = copy_package(tmp_path)
    index = package / "data" / "index.py"
    index.write_text(re.sub(r"^PHOTOGRAPHED = .*\n", name, index.read_text(encoding="utf-8"), flags=re.MULTILINE))
    published = package / "preparation" / "published.py"
    insert(published, "PUBLISHED: tuple[Published, ...] = (\n", before=entry)
    insert(published, ")\n\n\ndef locate_demo(", before="    BDD100K,\n")
    (package / "commands" / "classes.py").write_text(verb, encoding="utf-8")
    insert(package / "cli.py", "def main(", before=command + "\n\n")
    data = tmp_path / "data" / "bdd100k"
    for split in ("train", "val"):
        write_pair(data / f"images/10k/{split}/a.jpg", data / f"labels/sem_seg/masks/{split}/a.png", 0, [0, 13, 255])
    run_python(tmp_path, "-m", "cluda_cli", "prepare", "bdd100k")
    listed = run_python(tmp_path, "-m", "cluda_cli", "classes", "bdd100k").splitlines()
    assert listed == [f"{i:>3}  {c.name}" for i, c in enumerate(CITYSCAPES)]


def copy_package(folder: Path) -> Path:
    """A copy of the package and its presets, to be changed."""
    shutil.copytree(REPOSITORY / "cluda_cli", folder / "cluda_cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "presets", folder / "presets")
    return folder / "cluda_cli"


def run_python(folder: Path, *arguments: str) -> str:
    """What Python prints with the package that was copied into a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def insert(path: Path, line: str, *, before: str) -> None:
    """Put text before the only place where a line stands."""
    content = path.read_text(encoding="utf-8")
    assert content.count(line) == 1
    path.write_text(content.replace(line, before + line), encoding="utf-8")

"""Every command that the README and the pages show is run, in their order, on tiny data."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluda_cli import presets
from cluda_cli.cli import app
from cluda_cli.data.demo import make_demo
from cluda_cli.data.labels import CITYSCAPES
from cluda_cli.models.segmenter import Segmenter

REPOSITORY = Path(__file__).parent.parent
PAGES = ["README.md", "docs/training.md", "docs/own-data.md", "docs/evaluation.md"]
# Laid over every shown `train`, so that it takes seconds; the method stays the one that is shown.
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
    page = (REPOSITORY / "docs" / "own-data.md").read_text(encoding="utf-8")
    Path("mycity.toml").write_text(re.search(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE).group(1))
    make_demo(data / "demo", counts={"render": {"train": 4, "val": 1}, "camera": {"train": 4, "val": 2}})
    # The pages show the full-size demo; here a smaller one lies in its place and is left as it is.
    monkeypatch.setattr("cluda_cli.data.demo.make_demo", lambda folder: None)
    return tmp_path


def run(line: str) -> None:
    """Run one shown command; `&&` joins several. A `train` is made tiny by the last settings."""
    for part in line.split(" && "):
        if part.startswith("cluda train"):
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
    assert {line.split()[1] for line in done} == {"prepare", "train", "pseudo-label", "eval", "predict", "presets"}


def test_the_readme_names_what_ci_runs():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "pip install .\n" in readme
    assert "pip install '.[dev]' && pytest" in readme
    assert "pip install --quiet '.[dev]'\n" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_every_preset_is_in_the_readme():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in presets.names())


@pytest.mark.parametrize("page", sorted(p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob("docs/**/*.md")))
def test_links_lead_somewhere(page):
    for path in (REPOSITORY / page, REPOSITORY / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), link


def test_every_preset_builds_its_network():
    """Every preset, alone and under `small`, takes a step elsewhere; here the full-size networks are built."""
    for name in presets.names():
        settings = presets.load([name])
        Segmenter(settings.model, 19)

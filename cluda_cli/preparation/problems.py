"""What can be wrong with a dataset on disk, and its report: each kind with its count and a few examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

EXAMPLES = 3  # files named per kind of problem
IDS = 4  # raw ids named per kind of problem


class Kind(Enum):
    """(what is counted, whether it is an error, remedy)."""

    UNREADABLE = ("files that cannot be read", True, "unpack or download them again")
    DEEP_IMAGE = ("images that are not 8-bit", True, "convert them to 8 bits per channel")
    NAME = ("file names that are not UTF-8", True, "rename them")
    EMPTY = ("splits without images", True, "correct the pattern, or take the split out of the description")
    SIZE = ("labels of another size than their image", True, "image and label must have the same height and width")
    ORIENTATION = (
        "labels of images that are stored turned",
        True,
        "set labels_upright = true in the description if labels lie on the upright images; else remove the orientation "
        "from the images, as with exiftool -Orientation= FILE",
    )
    IDS = ("labels with ids outside the class table", True, "each id must name a class or be ignored")
    LOSSY = ("labels in a lossy format", True, "compression changes the ids near edges; export the labels as PNG")
    FORM = ("labels of the wrong form", True, "")
    DUPLICATE = ("images or labels that share a name", True, "it is unclear which label belongs to which image")
    UNPAIRED = ("splits in which no label fits an image", True, "names must agree where the patterns have wildcards")
    NO_LABEL = (
        "images without a label",
        True,
        "add the labels; or keep the images as unlabelled with --skip-bad, or in a split without labels",
    )
    REFERENCE = (
        "paired pictures of another size than their image",
        True,
        "both must have the same height and width, because they are cropped alike",
    )
    NO_PAIR = (
        "splits in which no paired picture fits an image",
        True,
        "names must agree where the patterns have wildcards, or the lists of pairs must name the files",
    )
    BLANK = (
        "splits whose labels hold no class",
        True,
        "every pixel is ignored: check the ids; or keep the images as unlabelled with --skip-bad",
    )
    LONE = ("splits whose labels hold one class only", False, "there, the right answer is the same everywhere")
    REDUCED = ("labels in a wider form than needed, read without loss", False, "")
    NEAR = ("labels with colours that were read as the nearest listed one", False, "")
    NO_REFERENCE = ("images without a paired picture", False, "")
    NO_IMAGE = ("labels without an image", False, "")
    NOT_THERE = ("splits of the publisher that are not there", False, "")
    LINKED = ("folders found again through a link, whose images are taken once", False, "")
    LISTED = ("listed names without an image", False, "")
    SHARED = ("images in two splits", False, "scores on one split would flatter what was trained on the other")
    ABSENT = ("classes that never occur", False, "")

    @property
    def text(self) -> str:
        return self.value[0]

    @property
    def is_error(self) -> bool:
        """Whether a pair with this problem would train or score on wrong data."""
        return self.value[1]

    @property
    def leaves_out(self) -> bool:
        """Whether --skip-bad leaves out the file concerned. Images that only lack a usable label are kept."""
        return self.is_error and self not in {Kind.NO_LABEL, Kind.UNPAIRED, Kind.NO_PAIR, Kind.BLANK, Kind.EMPTY}

    @property
    def remedy(self) -> str:
        return self.value[2]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file (or class)."""

    kind: Kind
    file: str
    """Path relative to the dataset; for some kinds the name of a split, class or listed image."""
    detail: str = ""
    ids: dict[str, int] = field(default_factory=dict)
    """Raw id or colour -> number of pixels, for Kind.IDS."""

    def to_json(self) -> list[Any]:
        return [self.kind.name, self.file, self.detail, self.ids]


class BadFile(Exception):  # noqa: N818  it carries a Problem from the reader to the report
    """A file cannot be used."""

    def __init__(self, kind: Kind, detail: str = "", ids: dict[str, int] | None = None) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.ids = kind, detail, ids or {}

    def to_problem(self, file: str) -> Problem:
        return Problem(self.kind, file, self.detail, self.ids)


def format_report(problems: Sequence[Problem]) -> list[str]:
    """One line per kind with its count, errors first, followed by up to three examples each."""
    lines = []
    for kind in sorted(Kind, key=lambda kind: not kind.is_error):
        of_kind = [problem for problem in problems if problem.kind is kind]
        if not of_kind:
            continue
        ids: Counter[str] = Counter()
        for problem in of_kind:
            ids.update(problem.ids)
        found = f" ({describe_ids(ids)})" if ids else ""
        remedy = f"; {kind.remedy}" if kind.remedy else ""
        lines.append(f"{'error' if kind.is_error else 'warning'}: {kind.text}: {len(of_kind)}{found}{remedy}")
        lines += [f"  {p.file}: {p.detail}" if p.detail else f"  {p.file}" for p in of_kind[:EXAMPLES]]
        if len(of_kind) > EXAMPLES:
            lines.append(f"  and {len(of_kind) - EXAMPLES} more")
    return lines


def describe_ids(ids: dict[str, int]) -> str:
    """`40 in 12 pixels, 77 in 3 pixels`, the most frequent first; at most four."""
    ranked = sorted(ids.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{name} in {count} pixel{'s' * (count != 1)}" for name, count in ranked[:IDS])
    return shown + (f" and {len(ranked) - IDS} more ids" if len(ranked) > IDS else "")

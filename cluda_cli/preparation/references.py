"""Pair images with pictures that show the same scene under other conditions, by name or by lists of pairs."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from cluda_cli.data.globs import Found, find_files
from cluda_cli.data.index import IMAGE_SUFFIXES
from cluda_cli.errors import DataError, first_line


def read_lists(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """The pairs of names of all CSV files that match a glob: an image, then its paired picture.

    Raises DataError for a file that cannot be read, or a line without two names.
    """
    for file in find_files(root, pattern):
        path = root / file.path
        try:
            lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"the list of pairs cannot be read: {first_line(error)}", path) from error
        for number, line in enumerate(lines, start=1):
            if line and len(line) != 2:
                what = f"line {number} has {len(line)} columns"
                raise DataError(what, path, "write the name of an image, a comma, and that of its paired picture")
            if line:
                yield line[0].strip(), line[1].strip()


def match_lists(
    images: Sequence[Found], references: Sequence[Found], listed: Iterator[tuple[str, str]]
) -> dict[str, str]:
    """Image path -> path of its paired picture, as lists say; names that no file has, or several, are left out."""
    of_image, of_reference = _name(images), _name(references)
    found = {}
    for image, reference in listed:
        one, other = _find(image, of_image), _find(reference, of_reference)
        if one and other:
            found[one] = other
    return found


def _name(files: Sequence[Found]) -> dict[str, str | None]:
    """Name -> path of the only file that may be called so; None where several may."""
    paths: dict[str, str | None] = {}
    for file in files:
        for name in set(file.names):
            paths[name] = file.path if name not in paths else None
    return paths


def _find(text: str, paths: dict[str, str | None]) -> str | None:
    """The file of a name, which may be a path that begins above the dataset's folders or ends without a suffix."""
    path = PurePosixPath(text.replace("\\", "/"))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        path = path.with_suffix("")
    tails = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
    return next((paths[tail] for tail in tails if tail in paths), None)

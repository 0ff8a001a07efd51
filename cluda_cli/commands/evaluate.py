"""The verb `eval`: checkpoint + labelled split -> IoU tables."""

from pathlib import Path

from cluda_cli import console
from cluda_cli.data.index import find
from cluda_cli.errors import DataError
from cluda_cli.files import remove_temporaries, write_json
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import Scores, round_percent
from cluda_cli.inference.scoring import compare_classes, score
from cluda_cli.inference.weights_file import load_weights

MEANS = {
    "mean IoU": "miou",
    "mean IoU, common pixels": "miou_common_pixels",
    "mean IoU, all classes": "miou_all_classes",
}
"""Rows of the table -> keys of a protocol; the last one exists for all classes only."""


def evaluate(
    checkpoint: Path,
    *,
    dataset: str | None = None,
    split: str = "val",
    data_root: Path | None = None,
    device: str = "auto",
    as_json: bool = False,
    confusion: Path | None = None,
) -> Scores:
    """Print IoU by class and protocol, and return the scores.

    With `confusion`, also write the confusion matrix to that JSON file.
    Dataset and data root default to those of the checkpoint's run. Classes are matched by name.

    Raises DataError if the dataset, its labels or the checkpoint cannot be used.
    """
    chosen = pick_device(device)
    trained = load_weights(checkpoint, chosen)
    data = trained.settings.data
    index = find(dataset or data.target, data_root or data.root)
    compare_classes(index.classes, trained.classes)
    scores = score(
        trained.network,
        index,
        split=split,
        classes=trained.classes,
        seen=trained.seen,
        box=data.target_box,
        evaluation=trained.settings.inference,
        device=chosen,
    )
    if not scores.common_pixels:
        what = f'no pixel of split "{split}" is labelled with a class that the network was trained on'
        raise DataError(what, index.folder, f"it was trained on {', '.join(trained.seen)}; take another --split")
    if confusion:
        counts = scores.confusion.counts.tolist()
        content = {"classes": scores.names, "rows": "label", "columns": "prediction", "counts": counts}
        remove_temporaries(confusion.parent, below=False)
        write_json(confusion, content, indent=None)
    described = {
        "checkpoint": str(trained.path),
        "dataset": index.name,
        "split": split,
        "images": scores.images,
        "network": trained.network_name,
    }
    if as_json:
        found = {
            "protocols": scores.protocols(),
            "target_private": scores.target_private,
            "pixel_accuracy": round_percent(scores.pixel_accuracy),
            "mean_accuracy": round_percent(scores.mean_accuracy),
        }
        console.result_json(described | found)
    else:
        _print(scores, f"{index.name} {split}, {scores.images} images, {trained.network_name} network")
    return scores


def _print(scores: Scores, title: str) -> None:
    """Print a table with a column for each protocol. `-` stands for a class that is left out or has no pixels."""
    protocols = scores.protocols()
    rows = [[name] + [_format_cell(p["iou"][name]) for p in protocols.values()] for name in scores.classes.names]
    for label, key in MEANS.items():
        rows.append([label, *(_format_cell(p[key]) if key in p else "" for p in protocols.values())])
    console.result_table(title, ["class", *protocols], rows)
    accuracy = [_format_cell(round_percent(value)) for value in (scores.pixel_accuracy, scores.mean_accuracy)]
    console.result(f"pixel accuracy {accuracy[0]}, mean accuracy {accuracy[1]}")
    if scores.target_private:
        console.result(f"target-private, never in the source: {', '.join(scores.target_private)}")


def _format_cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

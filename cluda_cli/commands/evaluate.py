"""The verb `eval`: checkpoint + labelled split -> IoU tables."""

from pathlib import Path

from cluda_cli import console
from cluda_cli.data.index import find
from cluda_cli.errors import DataError
from cluda_cli.files import write_json
from cluda_cli.inference.device import pick_device
from cluda_cli.inference.metrics import Scores, round_percent
from cluda_cli.inference.scoring import compare_classes, score
from cluda_cli.inference.weights_file import load_weights


def evaluate(
    checkpoint: Path,
    *,
    dataset: str | None = None,
    split: str = "val",
    data_root: Path | None = None,
    device: str = "auto",
    as_json: bool = False,
    confusion: Path | None = None,
) -> None:
    """Print IoU by class and protocol. With `confusion`, also write the confusion matrix to that JSON file.

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
    if not scores.confusion.counts.any():
        raise DataError(f'no pixel of split "{split}" is labelled with a class that the network knows', index.folder)
    if confusion:
        counts = scores.confusion.counts.tolist()
        content = {"classes": trained.classes.names, "rows": "label", "columns": "prediction", "counts": counts}
        write_json(confusion, content, indent=None)
    described = {
        "checkpoint": str(checkpoint),
        "dataset": index.name,
        "split": split,
        "images": scores.images,
        "network": trained.network_name,
    }
    if as_json:
        accuracy = {
            "pixel_accuracy": round_percent(scores.pixel_accuracy),
            "mean_accuracy": round_percent(scores.mean_accuracy),
        }
        console.result_json(described | {"protocols": scores.protocols(), "unseen": list(scores.unseen)} | accuracy)
    else:
        _print(scores, f"{index.name} {split}, {scores.images} images, {trained.network_name} network")


def _print(scores: Scores, title: str) -> None:
    """Print a table with a column for each protocol. `-` stands for a class that is left out or has no pixels."""
    protocols = scores.protocols()
    rows = [[name] + [_format_cell(p["classes"][name]) for p in protocols.values()] for name in scores.classes.names]
    rows.append(["mean IoU"] + [_format_cell(p["miou"]) for p in protocols.values()])
    if scores.unseen:
        empty = [""] * (len(protocols) - 1)
        rows.append(["with unseen", _format_cell(protocols["all"]["miou_with_unseen"]), *empty])
    console.result_table(title, ["class", *protocols], rows)
    accuracy = [_format_cell(round_percent(value)) for value in (scores.pixel_accuracy, scores.mean_accuracy)]
    console.result(f"pixel accuracy {accuracy[0]}, mean accuracy {accuracy[1]}")
    if scores.unseen:
        console.result(f"unseen: the source never had {', '.join(scores.unseen)}")


def _format_cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

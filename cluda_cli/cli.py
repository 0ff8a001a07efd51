"""The commands. Each parses its options, loads settings and calls one verb. Only the verbs import torch."""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from cluda_cli import __version__, console
from cluda_cli.data.index import PUBLISHED_NAMES
from cluda_cli.distributed.place import read_place
from cluda_cli.errors import CludaError, EnvironmentProblem, Interrupted, SettingsError, is_out_of_memory

# \b keeps the line breaks of a paragraph in the help.
EXAMPLES = """\b
Examples:
  cluda train --preset demo               adapt to embedded demo data
  cluda prepare gta
  cluda prepare cityscapes
  cluda bench --preset daformer-cluda     time and memory that it takes here
  cluda train --preset daformer-cluda     GTA5 -> Cityscapes, as in the paper
  cluda eval --ckpt runs/demo/best.safetensors
  cluda compare runs/a runs/b             means over seeds, gains, differences
  cluda predict images/                   with the newest run's best weights
  cluda import-weights hrda.pth --preset hrda

\b
Exit codes: 0 done, 1 the run failed, 2 usage or settings, 3 data,
4 environment, 130 interrupted with state saved.
"""


class _Commands(TyperGroup):
    """Turns every expected failure into one message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CludaError as problem:
            failure = problem
        except KeyboardInterrupt:
            failure = Interrupted("interrupted")
        except BrokenPipeError:
            raise  # nobody reads our output any more; click exits quietly
        except OSError as error:
            failure = EnvironmentProblem(
                error.strerror or str(error), error.filename or "", "check disk and permissions"
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            where = "on the GPU" if type(error).__name__ == "OutOfMemoryError" else "on the CPU"
            remedy = "train with a smaller data.batch_size, data.crop or model.encoder; predict with --device cpu"
            failure = EnvironmentProblem(f"out of memory {where}", "", remedy)
        console.error(failure)
        raise typer.Exit(failure.exit_code)


class _Command(TyperCommand):
    """Refuses an option that is given twice, unless it is a list: one of the two would be dropped without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        single = [p for p in given if p.param_type_name == "option" and not (p.multiple or p.is_eager)]
        for option in single:
            if single.count(option) > 1:
                raise SettingsError("is given twice", max(option.opts, key=len), "give it once")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="cluda",
    cls=_Commands,
    help="Adapt a semantic-segmentation network from a labelled domain to an unlabelled one.",
    epilog=EXAMPLES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_command = partial(app.command, cls=_Command)

Presets = Annotated[
    list[str] | None,
    typer.Option("--preset", metavar="NAME", help="Preset name or file; repeatable, later ones win."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; repeatable.")
]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder of the datasets.  [default: data]")]
RunsDataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder of the datasets.  [default: the run's]")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Checkpoint = Annotated[Path, typer.Option("--ckpt", help="Weights, or a run, whose best weights are taken.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _version(value: bool) -> None:
    if value:
        console.result(f"cluda {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        console.result(context.get_help())


@_command()
def prepare(
    dataset: Annotated[str, typer.Argument(help=f"{', '.join(PUBLISHED_NAMES)}, demo, or a TOML description.")],
    data_root: DataRoot = None,
    check: Annotated[bool, typer.Option("--check", help="Only check and report; write nothing.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files that are wrong instead of refusing the dataset.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Also store training images uncompressed, for fast loading, at the size of a run: the height and "
            "width of its data.source_box or data.target_box, as 760x1280, or `original`.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.  [default: one per usable core]")] = None,
) -> None:
    """Check a dataset, map its labels to train ids and index it."""
    if check and cache:
        raise SettingsError("--check and --cache exclude each other", "prepare", "give one of them")
    from cluda_cli.commands.prepare import prepare

    prepare(dataset, data_root or Path("data"), check=check, skip_bad=skip_bad, cache=cache, workers=workers)


@_command()
def train(
    preset: Presets = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Labelled dataset, or false; repeat to draw from several.  [default: gta]"),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Unlabelled dataset.  [default: cityscapes]")] = None,
    data_root: DataRoot = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run.  [default: runs/<presets and changed settings>]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,2", help="One run per seed, one after another; --resume goes on with the group."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="GPUs of this machine to train on, or CPU processes.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder, or the newest run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    set_: Overrides = None,
) -> None:
    """Adapt a network from the source to the target domain."""
    if resume and overwrite:
        raise SettingsError("--resume and --overwrite exclude each other", "train", "give one of them")
    place = read_place()
    if place and not place.prints:
        console.mute()
    if place and devices not in (None, place.world_size):
        what = f"--devices {devices}, but torchrun started {place.world_size} processes"
        raise SettingsError(what, "train", "leave --devices out")
    named = {"seed": seed, "steps": steps, "device": device}
    if seeds is not None:
        if seed is not None:
            raise SettingsError("--seed and --seeds exclude each other", "train", "give one of them")
        if place or (devices and devices > 1):
            raise SettingsError("a group of seeds runs on one device", "--seeds", "start each seed with --seed")
        each = {number: _options(source, target, data_root, named | {"seed": number}) for number in _parse_seeds(seeds)}
        _train_seeds(preset or [], each, set_ or [], run, resume=resume, overwrite=overwrite)
        return
    options = _options(source, target, data_root, named)
    count = devices if devices and devices > 1 and place is None else 1  # processes that are still to be started
    _train_one(preset or [], options, set_ or [], run, processes=count, resume=resume, overwrite=overwrite)


def _train_one(
    preset: list[str],
    options: dict[str, Any],
    overrides: list[str],
    run: Path | None,
    *,
    processes: int,
    resume: bool,
    overwrite: bool,
) -> None:
    """Train one run, here or in so many new processes."""
    from cluda_cli import presets, runs

    folder = run or (runs.find_resumable if resume else runs.name_folder)(preset, options, overrides)
    if resume:
        if preset:
            console.warn("--preset only names the folder here; a resumed run keeps its own settings")
        settings = presets.resume(folder, options, overrides)
    else:
        settings = presets.load(preset, options, overrides)

    if processes > 1:  # all of them take the folder that was found here
        from cluda_cli.distributed.launch import launch

        chosen = [] if run else ["--run", str(folder)]
        raise typer.Exit(launch(processes, partial(main, [*sys.argv[1:], *chosen])))
    from cluda_cli.commands.train import train

    train(settings, folder, resume=resume, overwrite=overwrite)


def _parse_seeds(seeds: str) -> list[int]:
    """Distinct seeds from a list such as 0,1,2."""
    numbers = [part.strip() for part in seeds.split(",")]
    if not all(number.isascii() and number.isdigit() and len(number) < 19 for number in numbers):
        raise SettingsError(f'"{seeds}" is no list of seeds', "--seeds", "give whole numbers, as in --seeds 0,1,2")
    if len({*map(int, numbers)}) < len(numbers):
        raise SettingsError("names a seed twice", "--seeds", "name each once")
    return [int(number) for number in numbers]


def _train_seeds(
    preset: list[str],
    options: dict[int, dict[str, Any]],
    overrides: list[str],
    run: Path | None,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Train a run for each seed, in a folder of its own; with `resume`, those that have begun go on."""
    from cluda_cli import presets, runs

    folders = {s: run / f"seed={s}" if run else runs.name_folder(preset, own, overrides) for s, own in options.items()}
    going_on = {seed: resume and (folder / "settings.json").is_file() for seed, folder in folders.items()}
    settings = {
        seed: presets.resume(folders[seed], own, overrides) if going_on[seed] else presets.load(preset, own, overrides)
        for seed, own in options.items()
    }
    from cluda_cli.commands.train import train

    for seed, folder in folders.items():
        console.info(f"seed {seed}: {folder}")
        train(settings[seed], folder, resume=going_on[seed], overwrite=overwrite)
    console.info(f"next: cluda compare {' '.join(shlex.quote(str(folder)) for folder in folders.values())}")


@_command(short_help="Measure a step: time by part, memory, hours of the run.")
def bench(
    preset: Presets = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Labelled dataset, read with --data; repeatable.  [default: gta]")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Unlabelled dataset, read with --data.  [default: cityscapes]")
    ] = None,
    data_root: DataRoot = None,
    data: Annotated[
        bool, typer.Option("--data", help="Use the prepared datasets, and measure loading and validation too.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time; each of two measurements takes as many.")] = 10,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    as_json: AsJson = False,
    set_: Overrides = None,
) -> None:
    """Measure what a run will take: step time by part, images/s, memory, the largest batch, hours.

    Downloads no weights, needs no data and writes nothing.
    """
    from cluda_cli import presets

    settings = presets.load(preset or [], _options(source, target, data_root, {"device": device}), set_ or [])

    from cluda_cli.commands.bench import bench

    bench(settings, steps=steps, prepared=data, as_json=as_json)


def _options(
    source: list[str] | None, target: str | None, data_root: Path | None, training: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Collect the named options that were given, as a tree of settings."""
    root = str(data_root) if data_root else None
    sources: list[str] | Literal[False] | None = False if source == ["false"] else source or None
    named = {"data": {"source": sources, "target": target, "root": root}, "training": training}
    return {section: {k: v for k, v in values.items() if v is not None} for section, values in named.items()}


@_command("pseudo-label", short_help="Label the target; the result is a dataset for train --source.")
def pseudo_label(
    ckpt: Checkpoint,
    dataset: Annotated[str | None, typer.Option(help="Prepared dataset.  [default: the run's target]")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    out: Annotated[Path | None, typer.Option(help="Folder.  [default: pseudo-labels/... beside the weights]")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="0..1", help="Less confident pixels become 255.  [default: 0.968]"),
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Threshold of a class: its median confidence, at most 0.9.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier pseudo-labels there.")] = False,
    data_root: RunsDataRoot = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Label the target with a trained network; the result is a dataset that `train --source` accepts."""
    if per_class and threshold is not None:
        raise SettingsError("--threshold and --per-class exclude each other", "pseudo-label", "give one of them")
    from cluda_cli.commands.pseudo_label import THRESHOLD, pseudo_label

    pseudo_label(
        ckpt,
        dataset=dataset,
        split=split,
        out=out,
        threshold=THRESHOLD if threshold is None else threshold,
        per_class=per_class,
        overwrite=overwrite,
        data_root=data_root,
        device=device,
        as_json=as_json,
    )


@_command("eval")
def evaluate(
    ckpt: Checkpoint,
    dataset: Annotated[str | None, typer.Option(help="Prepared dataset.  [default: the run's target]")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    data_root: RunsDataRoot = None,
    device: Device = "auto",
    as_json: AsJson = False,
    confusion: Annotated[Path | None, typer.Option(help="Also write the confusion matrix to this JSON file.")] = None,
) -> None:
    """IoU per class and protocol (19/16/13) on labelled images."""
    from cluda_cli.commands.evaluate import evaluate

    evaluate(
        ckpt, dataset=dataset, split=split, data_root=data_root, device=device, as_json=as_json, confusion=confusion
    )


@_command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run of the group that gains are over.  [default: the first]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Means over seeds, per class too, with paired gains over a baseline, and the settings that differ."""
    from cluda_cli.commands.compare import compare

    compare(runs, baseline=baseline, as_json=as_json)


@_command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its title.  [default: the names of the runs]")] = "",
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run of the group that gains are over.  [default: the first]")
    ] = None,
) -> None:
    """Write one HTML file about runs: scores, classes, curves, pictures, settings. It needs no network to be shown."""
    from cluda_cli.commands.report import report

    report(runs, out=out, title=title, baseline=baseline)


@_command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Files, folders or globs.")],
    ckpt: Annotated[
        Path | None, typer.Option("--ckpt", help="Weights, or a run.  [default: the newest run's best]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("predictions"),
    output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="train-id, label-id, color, overlay, confidence; repeatable.  [default: train-id, color, overlay]",
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Segment pictures of any size."""
    from cluda_cli.commands.predict import find_newest_checkpoint, predict

    checkpoint = ckpt or find_newest_checkpoint(Path("runs"))
    if not ckpt:
        console.info(f"weights: {checkpoint}")
    outputs = output or ["train-id", "color", "overlay"]
    predict(images, checkpoint=checkpoint, out=out, outputs=outputs, device=device, as_json=as_json)


@_command("import-weights", short_help="Turn a published checkpoint into weights for the other commands.")
def import_weights(
    file: Annotated[Path, typer.Argument(help="Checkpoint of DAFormer, HRDA, MIC, CLUDA or SegFormer.")],
    preset: Presets = None,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Weights to write.  [default: the file's name with .safetensors]")
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="NAME", help="student or teacher of a file of self-training.")
    ] = "student",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a published checkpoint into weights for eval, predict and pseudo-label.

    Presets and settings say which network it is; they travel with the weights. Every tensor has to match.
    """
    from cluda_cli import presets

    settings = presets.load(preset or [], None, set_ or [])

    from cluda_cli.commands.import_weights import import_weights

    import_weights(file, settings, out=out, network=network, overwrite=overwrite, as_json=as_json)


@_command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has for a run: versions, GPUs, disk, shared memory, weights, hub."""
    from cluda_cli.commands.doctor import doctor

    doctor(as_json=as_json)


@_command("presets", short_help="List the presets, or show resolved settings.")
def show_presets(
    action: Annotated[str, typer.Argument(help="list or show")] = "list",
    name: Annotated[
        list[str] | None, typer.Argument(metavar="PRESET...", help="Presets or files to resolve, left to right.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """List the presets, or print the resolved settings of some as TOML with differences from the defaults marked."""
    from cluda_cli import presets

    if action == "list" and not name:
        width = max(map(len, presets.names()))
        for preset in presets.names():
            console.result(f"{preset:<{width}}  {' '.join(presets.header(preset)[:1])}")
    elif action == "show":
        console.result(presets.to_toml(presets.load(name or [], None, set_ or [])).rstrip())
    else:
        raise SettingsError(
            f'"{action}" is neither list nor show', "presets", "try `cluda presets show daformer-cluda`"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `cluda` command; the arguments are those of the shell unless given."""
    console.open_streams()
    app(arguments, prog_name="cluda")

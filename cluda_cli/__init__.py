"""Domain-adaptive semantic segmentation, from the command line and from Python (docs/how-to/python.md)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluda_cli.commands.evaluate import evaluate
    from cluda_cli.commands.prepare import prepare
    from cluda_cli.commands.train import train
    from cluda_cli.inference.predictor import Prediction, Predictor, load
    from cluda_cli.presets import load as load_settings

__version__ = "0.1.0"
__all__ = ["Prediction", "Predictor", "evaluate", "load", "load_settings", "prepare", "train"]

_PLACES = {
    "Prediction": "cluda_cli.inference.predictor:Prediction",
    "Predictor": "cluda_cli.inference.predictor:Predictor",
    "evaluate": "cluda_cli.commands.evaluate:evaluate",
    "load": "cluda_cli.inference.predictor:load",
    "load_settings": "cluda_cli.presets:load",
    "prepare": "cluda_cli.commands.prepare:prepare",
    "train": "cluda_cli.commands.train:train",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch with it, only now: `cluda --help` needs none of it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)

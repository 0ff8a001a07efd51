"""The tables of the terms of the loss."""

import pytest
from pydantic import ValidationError

from cluda_cli import settings


def test_defaults_are_the_papers_values():
    terms = settings.Objectives()
    assert terms.feature_distance.weight == 0.005
    assert (terms.pixel_contrast.temperature, terms.pixel_contrast.size) == (1.0, 65)


def test_a_table_switches_a_term_on_and_false_switches_it_off():
    terms = settings.Objectives.model_validate({"masked": {}, "anchor_contrast": True, "pixel_contrast": False})
    assert terms.masked == settings.CrossEntropy()
    assert terms.anchor_contrast == settings.AnchorContrast()
    assert terms.pixel_contrast is None


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ValidationError):
        settings.Objectives.model_validate({"mixed": {"weight": -1}})

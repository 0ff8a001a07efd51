"""The table of the network."""

import pytest
from pydantic import ValidationError

from cluda_cli import settings


def test_defaults_are_the_papers_values():
    model = settings.Model()
    assert (model.encoder, model.decoder.channels, model.decoder.dilations) == ("mit_b5", 256, (1, 6, 12, 18))


@pytest.mark.parametrize("wrong", [{"output_stride": 4}, {"freeze": ["neck"]}, {"decoder": {"dropout": 1}}])
def test_what_no_network_can_be_is_refused(wrong):
    with pytest.raises(ValidationError):
        settings.Model.model_validate(wrong)

"""The checksum covers names, types, shapes and bytes, and nothing that a file does not keep."""

import pytest
import torch

from cluda_cli.inference.checksum import checksum

CONTENT = {"a": torch.arange(6.0).view(2, 3), "b": [1, (2.5, None)], 3: "x"}


def test_what_a_file_does_not_keep_does_not_count():
    turned = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert turned.stride() != CONTENT["a"].stride()
    assert checksum({3: "x", "b": [1, (2.5, None)], "a": turned.requires_grad_()}) == checksum(CONTENT)
    assert checksum([torch.tensor(1.5), torch.empty(0), torch.ones(2, dtype=torch.bfloat16)])


@pytest.mark.parametrize(
    "change",
    [
        {"a": CONTENT["a"].view(3, 2)},
        {"a": CONTENT["a"].double()},
        {"a": CONTENT["a"].view(torch.int32)},
        {"a": CONTENT["a"] + 0.5},
        {"b": [1, [2.5, None]]},
        {"b": [1, (2.5, False)]},
        {3: "y"},
        {4: None},
    ],
    ids=str,
)
def test_every_change_of_content_counts(change):
    assert checksum(CONTENT | change) != checksum(CONTENT)

"""Seeds depend on every part of their name and on nothing else."""

from cluda_cli.seeds import derive_seed


def test_a_seed_is_the_same_on_every_machine():
    assert derive_seed(0, "mixing", 3) == derive_seed(0, "mixing", 3)
    assert 0 <= derive_seed(0, "mixing", 3) < 2**63


def test_every_part_of_the_name_counts():
    names = [(0, "mixing"), (1, "mixing"), (0, "masking"), (0, "mixing", 1), (0, "mixing", 1, 0), (0, "mixing", 10)]
    assert len({derive_seed(*name) for name in names}) == len(names)

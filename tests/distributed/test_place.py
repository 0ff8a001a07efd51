"""The environment variables of torchrun say which rank a process is."""

from cluda_cli.distributed.place import Place, read_place


def test_the_place_is_what_torchrun_says(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert read_place() is None  # one process is alone, whoever started it
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_place() == Place(rank=1, local_rank=1, world_size=2, prints=False)
    monkeypatch.setenv("RANK", "0")
    assert read_place() == Place(rank=0, local_rank=1, world_size=2, prints=True)
    monkeypatch.delenv("RANK")
    assert read_place() is None

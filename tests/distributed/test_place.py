"""The environment variables of torchrun say which rank a process is, the scheduler on how many cores it runs."""

import os

from cluda_cli.distributed.place import Place, read_place, usable_cores


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


def test_usable_cores_are_those_that_the_scheduler_allows(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert usable_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1

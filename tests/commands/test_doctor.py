"""The verb `doctor`."""

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from cluda_cli.commands import doctor as verb
from cluda_cli.commands.doctor import LIBRARIES, doctor
from cluda_cli.errors import EnvironmentProblem

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def findings(capsys) -> dict[str, dict[str, str]]:
    return {row["subject"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_library_is_named_with_its_version(capsys):
    doctor(as_json=True)
    found = findings(capsys)
    assert set(LIBRARIES) < found.keys()
    assert found["torch"]["text"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["weights"]["state"] == "ok"
    assert "HF_HUB_OFFLINE" in found["hub"]["text"]


def test_the_report_is_a_line_for_each_finding(capsys):
    doctor()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= len(LIBRARIES) + 6
    assert any(line.startswith("hub           note: HF_HUB_OFFLINE") for line in lines)


def test_little_disk_and_shared_memory_are_noted(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 * 2**20, 0, 2**30))
    doctor(as_json=True)
    found = findings(capsys)
    assert found["disk"]["state"] == "note"
    if Path("/dev/shm").is_dir():
        assert "--set data.workers=0" in found["shared memory"]["text"]


def test_a_library_that_is_missing_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(verb, "LIBRARIES", ("no-such-library",))
    with pytest.raises(EnvironmentProblem, match="no-such-library"):
        doctor()
    assert "problem: not installed" in capsys.readouterr().out


def test_a_gpu_without_code_in_this_build_is_a_problem(monkeypatch, capsys):
    gpu = namedtuple("Gpu", "name total_memory major minor")("Old card", 8 * 2**30, 3, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(EnvironmentProblem, match="cuda:0"):
        doctor(as_json=True)
    assert "no code for sm_35" in findings(capsys)["cuda:0"]["text"]


@pytest.mark.parametrize("reachable", [True, False])
def test_the_hub_is_asked_for_its_address_alone(monkeypatch, capsys, reachable):
    def connect(address, timeout):
        assert address == ("huggingface.co", 443)
        if not reachable:
            raise OSError(101, "Network is unreachable")
        return socket.socket()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "create_connection", connect)
    doctor(as_json=True)
    assert findings(capsys)["hub"]["state"] == ("ok" if reachable else "note")

"""A pod's /progress on every address that a pod can have: the operator asks at the one in its status, which is IPv6 where the cluster is."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from finetune_api import names
from finetune_trainer.reporting import server
from finetune_trainer.reporting.reporter import RunReporter
from finetune_trainer.reporting.session import ENV_TERMINATION_LOG, reporting
from support.run_contexts import context, run_spec
from support.s3_server import free_port


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """A free port in the place of the pods'."""
    free = free_port("127.0.0.1")
    monkeypatch.setattr(names, "PROGRESS_PORT", free)
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))
    return free


@contextmanager
def pod(folder: Path) -> Iterator[RunReporter]:
    """A run in a pod, as long as the block lasts."""
    with reporting(context(folder, run_spec(), in_cluster=True).job) as reporter:
        yield reporter


def answer(host: str, port: int) -> bytes:
    with urllib.request.urlopen(f"http://{host}:{port}/progress", timeout=5) as answered:
        return bytes(answered.read())


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_pod_answers_on_ipv4_and_ipv6(port: int, tmp_path: Path) -> None:
    with pod(tmp_path):
        assert answer("127.0.0.1", port) == answer("[::1]", port) != b""


def test_a_pod_on_a_node_without_ipv6_answers_on_ipv4(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server._DualStack, "address_family", 255)  # which no kernel has
    with pod(tmp_path):
        assert answer("127.0.0.1", port)


def test_a_port_that_is_taken_is_said_and_the_run_goes_on(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", port)), pod(tmp_path):
        pass
    assert f"port {port} can't be opened (Address already in use)" in capsys.readouterr().out

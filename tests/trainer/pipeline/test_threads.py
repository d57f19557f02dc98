"""How PyTorch's threads wait: the OpenMP that it brings along itself says what it has read."""

import os
import subprocess
import sys

import pytest

IMPORT = "from finetune_trainer import cli, threads; threads.wait_briefly(); import torch"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP along on Linux alone")
@pytest.mark.parametrize(
    ("users", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "70"}, "70"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
    ids=["default", "spins", "passive", "active"],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(users: dict[str, str], spins: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    command = [sys.executable, "-c", IMPORT]

    shown = subprocess.run(command, env=environment | users | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True)

    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr

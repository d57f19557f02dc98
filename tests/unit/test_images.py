"""The images as their files describe them: what Triton needs at run time is in the trainer's, whichever base it is built on."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINER = (ROOT / "Dockerfile.trainer").read_text(encoding="utf-8")
BUILD = ROOT / "images" / "build.sh"


def test_the_base_has_what_the_trainers_image_would_install() -> None:
    (installed,) = re.findall(r"apt-get install -y --no-install-recommends ([\w .+-]+?) &&", TRAINER)
    (included,) = re.findall(r"--include=(\S+)", BUILD.read_text(encoding="utf-8"))
    assert {"gcc", "libc6-dev"} <= set(installed.split())
    assert {*installed.split(), "python3-dev"} <= set(included.split(","))


def test_the_compiler_is_installed_before_the_requirements_are_copied() -> None:
    assert 0 < TRAINER.find("apt-get install") < TRAINER.find("COPY requirements/")


def test_a_missing_header_ends_the_build_with_a_sentence() -> None:
    (check,) = re.findall(r"python3 -c '(.*?)'", TRAINER.replace("\\\n", ""), re.DOTALL)
    without = check.replace("os.path.exists(header)", "False")
    refused = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith("use a BASE that has it (Debian: python3-dev).")
    assert subprocess.run([sys.executable, "-c", check.replace("os.path.exists(header)", "True")], check=False).returncode == 0


def test_the_build_script_is_bash() -> None:
    subprocess.run(["bash", "-n", BUILD], check=True)

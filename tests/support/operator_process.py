"""The operator of this checkout as a process outside of the cluster, which tests kill and start again, and the stand-in that its pods run."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cluster.image import write_image
from finetune_operator.settings import Settings
from support.finetunejobs import JobInCluster, merged
from support.kubernetes import BIN, Cluster
from support.s3_server import free_port
from support.specs import job, minimal_spec

CRD = Path(__file__).parents[2] / "crds" / "finetunejobs.finetune.dev.yaml"
ACTOR = "localhost/actor:1"  # tests/cluster/k8s/actor: ends as the job's name says
SMALL = {"resources": {"gpus": 0, "cpu": "10m", "memory": "64Mi"}, "storage": {"workspace": {"size": "1Gi"}}}


def install_crd(kube: Cluster) -> None:
    """The CRD of this checkout on the cluster, ready for objects."""
    kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD))
    kube.wait("the API of FineTuneJobs", lambda: kube.kubectl("get", "finetunejobs", "--all-namespaces", check=False).returncode == 0)


def get_ready(kube: Cluster, folder: Path) -> None:
    """The CRD on the cluster, the stand-in's image on its node."""
    install_crd(kube)
    write_image(ACTOR, folder / "actor.tar", ["/actor"], {str(BIN / "actor"): "/actor"})
    kube.import_archive(folder / "actor.tar")


def small_job(kube: Cluster, namespace: str, name: str, **changes: Any) -> JobInCluster:
    """A job for the stand-in, with changes to its spec; not applied yet."""
    return JobInCluster(kube, namespace, job(merged(minimal_spec() | SMALL, changes), name))


A_USERS_RESYNC = str(Settings().resync_seconds)  # tests look sooner, where they do not say otherwise


class OperatorProcess:
    """One operator.

    Args:
        log: where it writes; what a killed one wrote stays.
        kubeconfig: another way to the API server than the administrator's, such as a proxy.
        settings: more of its environment, without the prefix.
    """

    def __init__(self, kube: Cluster, log: Path, *, kubeconfig: Path | None = None, **settings: str) -> None:
        self._log = log
        self._settings = {"TRAINER_IMAGE": ACTOR, "RESYNC_SECONDS": "5", **settings}
        self._kubeconfig = str(kubeconfig or kube.kubeconfig)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def log(self) -> str:
        """Everything that it wrote."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """Of the process that start() began last."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """In the background, with a health port of its own."""
        self._port = free_port("127.0.0.1")
        settings = {**self._settings, "HEALTH_PORT": str(self._port)}
        prefixed = {f"FINETUNE_OPERATOR_{name}": value for name, value in settings.items()}
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "finetune_operator.main"]
            environment = {**os.environ, "KUBECONFIG": self._kubeconfig, **prefixed}
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def exit_code(self) -> int | None:
        """Of the last process, negative for a signal; None while it runs and before the first start."""
        return self._process.poll() if self._process else None

    def ask(self, path: str) -> tuple[int, str]:
        """Status and text of what it answers on its health port; (0, why) when it does not."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def kill(self) -> None:
        """SIGKILL, as a node that dies would."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: the process loses its time and does not know it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> int:
        """SIGCONT; returns the exit code of an operator that finds its Lease lost."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        return self._process.wait(timeout=30)

    def stop(self) -> int:
        """SIGTERM, as a rollout would; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=20)

    def require_no_traceback(self) -> None:
        """AssertionError with the end of the log when a defect shows in it."""
        assert "Traceback" not in self.log, self.log[-4000:]

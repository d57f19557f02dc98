"""Servers that this machine does not trust, on a real TLS server: no retry mends that, and the sentence says which file of certificates does."""

import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import SSLError
from finetune_trainer import destinations, sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError, DataError, SpecError
from finetune_trainer.sources import credentials
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.s3_errors import s3_errors
from huggingface_hub import close_session, constants
from support.run_contexts import context, refused, run_spec

HERE, ELSEWHERE = "IP:127.0.0.1", "DNS:elsewhere.example"


class Empty(BaseHTTPRequestHandler):
    """A server that has nothing."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Whoever does not trust it hangs up."""


@contextmanager
def serving(certificate: Path | None) -> Iterator[str]:
    """The https:// address of a server; without a certificate it speaks plain HTTP there."""
    with Server(("127.0.0.1", 0), Empty) as server:
        if certificate:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate, certificate.with_suffix(".key"))
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a certificate that signs itself, for one name; its key lies beside it."""
    if not shutil.which("openssl"):
        reason = "openssl is missing; tests/cluster/packages.sh installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)

    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp("tls") / "server.pem"
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path.with_suffix(".key"))]
        subject = ["-subj", "/CN=test", "-addext", f"subjectAltName={name}", "-days", "2"]
        subprocess.run(["openssl", "req", "-x509", *key, "-out", str(path), *subject], check=True, capture_output=True)
        return path

    return make


@pytest.fixture(scope="session")
def certificate(make_certificate: Callable[..., Path]) -> Path:
    return make_certificate(HERE)


@pytest.fixture(autouse=True)
def _nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of what this machine trusts besides the public authorities; few attempts."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(credentials, "PATIENT_ATTEMPTS", 2)
    close_session()
    yield
    close_session()


def s3_run(folder: Path, endpoint: str, *, in_cluster: bool = False) -> RunContext:
    """A run that reads a dataset from S3 and publishes there."""
    spec = run_spec("builtin://smollm2-135m", "s3://data/rows.jsonl", {"uri": "s3://models/bot", "endpoint": endpoint})
    spec["dataset"]["endpoint"] = endpoint
    return context(folder, spec, in_cluster=in_cluster)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (sources.check, "spec.dataset.source: s3://data/rows.jsonl"),
        (sources.fetch_dataset, "spec.dataset.source: s3://data/rows.jsonl"),
        (destinations.check_write, "spec.outputs.destinations[0].uri: s3://models/bot"),
    ],
)
def test_an_s3_server_of_a_private_authority_is_an_access_error(
    certificate: Path, tmp_path: Path, call: Callable[[RunContext], Any], field: str
) -> None:
    with serving(certificate) as endpoint:
        words = (field, f"certificate of {endpoint} is not trusted (self-signed certificate)", "AWS_CA_BUNDLE to a file with")
        with refused(AccessError, *words, hidden=("network", "trainer.caBundle")):
            call(s3_run(tmp_path, endpoint))


def test_a_pod_is_told_where_its_authorities_come_from(certificate: Path, tmp_path: Path) -> None:
    with (
        serving(certificate) as endpoint,
        refused(AccessError, "the chart's trainer.caBundle", "a file that AWS_CA_BUNDLE names"),
    ):
        sources.fetch_dataset(s3_run(tmp_path, endpoint, in_cluster=True))


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_an_authority_that_is_named_is_trusted_by_s3(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    with serving(certificate) as endpoint, refused(DataError, "spec.dataset.source", "does not exist"):
        sources.fetch_dataset(s3_run(tmp_path, endpoint))


def test_a_certificate_for_another_name_is_said_to_be_one(
    make_certificate: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_certificate(ELSEWHERE)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(other))
    with serving(other) as endpoint, refused(AccessError, endpoint, "is for another name", hidden=("elsewhere", "AWS_CA_BUNDLE")):
        sources.fetch_dataset(s3_run(tmp_path, endpoint))


def test_a_certificate_that_has_expired_is_said_to_be_one() -> None:
    expired = ssl.SSLCertVerificationError()
    expired.verify_code = 10
    where = Location("spec.dataset.source", "s3://data/rows.jsonl", "dataset", endpoint="https://s3.example")
    with refused(AccessError, where.endpoint, "has expired", "renew it", "clock", hidden=("AWS_CA_BUNDLE",)), s3_errors(where):
        raise SSLError(endpoint_url=where.endpoint, error="expired") from expired


def test_an_endpoint_without_tls_is_a_spec_error(tmp_path: Path) -> None:
    with serving(None) as endpoint:
        plain = endpoint.replace("https", "http")
        with refused(SpecError, "spec.dataset.source", f"{endpoint} answers without TLS", f"write {plain}"):
            sources.fetch_dataset(s3_run(tmp_path, endpoint))


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "no certificate"])
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_a_file_of_authorities_that_cannot_be_read_is_named_by_its_variable(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, variable: str
) -> None:
    bundle = tmp_path / "bundle.pem"
    if content:
        bundle.write_text(content)
    monkeypatch.setenv(variable, str(bundle))
    with serving(certificate) as endpoint, refused(AccessError, f"{variable} is '{bundle}'", "no readable file of certificates"):
        sources.fetch_dataset(s3_run(tmp_path, endpoint))


@contextmanager
def hub_at(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Hub that has nothing, as the one that this machine uses."""
    with serving(certificate) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield endpoint


@pytest.mark.parametrize("call", [sources.check, sources.fetch_model])
@pytest.mark.parametrize("in_cluster", [False, True])
def test_a_hub_of_a_private_authority_is_an_access_error(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[RunContext], Any], in_cluster: bool
) -> None:
    mend = "or into a file that SSL_CERT_FILE names" if in_cluster else "SSL_CERT_FILE to a file with"
    words = ("spec.model.source: hf://acme/base", "certificate of 127.0.0.1 is not trusted (self-signed certificate)", mend)
    with hub_at(certificate, monkeypatch), refused(AccessError, *words, hidden=("network", "AWS_CA_BUNDLE")):
        call(context(tmp_path, run_spec("hf://acme/base"), in_cluster=in_cluster))


def test_an_authority_that_is_named_is_trusted_by_the_hub(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with hub_at(certificate, monkeypatch), refused(DataError, "spec.model.source", "has no such file or revision"):
        sources.fetch_model(context(tmp_path, run_spec("hf://acme/base")))


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "no certificate"])
def test_a_file_of_authorities_that_cannot_be_read_is_named_before_the_hub_is_asked(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    bundle = tmp_path / "bundle.pem"
    if content:
        bundle.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with (
        hub_at(certificate, monkeypatch),
        refused(AccessError, f"SSL_CERT_FILE is '{bundle}'", "no readable file of certificates", "correct it"),
    ):
        sources.fetch_model(context(tmp_path, run_spec("hf://acme/base")))

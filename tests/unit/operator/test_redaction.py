"""redaction.py: no credential of a container's text ends in a status, and ordinary words stay readable."""

import time

import pytest
from finetune_operator.redaction import clean
from hypothesis import given, settings
from hypothesis import strategies as st

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://user:{SECRET}@hub.example.com/x failed",
        f"GET https://user:p@{SECRET}@hub.example.com/x failed",
        f"token hf_{SECRET} is not valid",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}",
        f"sent bearer {SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"aws_secret_access_key = {SECRET}",
        f"secretAccessKey: {SECRET}",
        f"AWS_SESSION_TOKEN={SECRET} in the environment",
        f'{{"password": "{SECRET}"}}',
        f"{{'token': '{SECRET}'}}",
        f"https://s3.example.com/k?X-Amz-Signature={SECRET}&x=1",
        f"https://s3.example.com/k?X-Amz-Security-Token={SECRET}",
        f"https://s3.example.com/k?AWSAccessKeyId=x&Signature={SECRET}&x=1",
        f"GET https://user:p/{SECRET}@hub.example.com/x failed",
        f"GET https://user:p?{SECRET}#p@hub.example.com:8080/x failed",
        f"proxy user:{SECRET}@proxy:3128 refused",
        f"first line\\nhf_{SECRET}\\nlast line",
        f"Authorization: Token {SECRET}",
        f"first line\\nBearer {SECRET}",
        f'body {{\\"password\\": \\"{SECRET}\\"}} refused',
        f'"password": "one, {SECRET} two"',
        f"{{'HF_TOKEN': b'{SECRET}'}}",
        f"environ({{'AWS_SECRET_ACCESS_KEY': '{SECRET}', 'HOME': '/'}})",
        f"trainer --hub-token {SECRET} --verbose",
        f"curl --password={SECRET}",
        f"api_key: {SECRET}",
        f"apikey={SECRET}",
        f"passwd={SECRET}",
        f"ghp_{SECRET} is not valid",
        f"a token of eyJhbGciOiJSUzI1NiJ9.{SECRET}.{SECRET} was refused",
        f"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\nMIIE\n{SECRET}",
        f"the key is {SECRET}9/",  # 40 characters, as AWS' secret keys have
        f"keys ['{SECRET}+1']",
    ],
)
def test_a_secret_never_survives(text: str) -> None:
    assert SECRET not in clean(text)


def test_what_surrounds_a_secret_stays() -> None:
    assert clean("GET https://me:pass@hub.example.com:8080/x: 403") == "GET https://***@hub.example.com:8080/x: 403"
    assert clean("proxy me:pass@proxy:3128 refused") == "proxy ***@proxy:3128 refused"
    assert clean("password='a b', user='me'") == "password=***, user='me'"
    assert clean("token=abc; retry") == "token=***; retry"


def test_an_access_key_id_keeps_only_its_kind() -> None:
    assert clean("key AKIAIOSFODNN7EXAMPLE is unknown") == "key AKIA*** is unknown"


@pytest.mark.parametrize(
    "text",
    [
        "The Secret finetune-credentials-for-s3 does not exist; make it, or correct credentials.secretName.",
        "hf://acme/model@0e9e39f: no such revision.",
        "s3://models/tiny: 403 for the key of Secret s3-keys-of-production.",
        "Expected 2048 tokens a row, found 4096.",
        "http://registry.example.com:8080/acme/model@v2 is not there.",
        "The image registry.example.com:5000/acme/trainer:2@sha256:0e9e39f249a16976918f6564b8830bc894c89659 can't be pulled.",
        "hf://acme/model@0e9e39f249a16976918f6564b8830bc894c89659/train.jsonl: no such file.",
        "Install hf_transfer, or unset HF_HUB_ENABLE_HF_TRANSFER.",
        "/cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0e9e39f2 is not readable.",
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 was expected.",
        "0/3 nodes are available: 1 node(s) had untolerated taint {gpu: h100}, 2 Insufficient nvidia.com/gpu.",
        "Row 12, column completion: 7 tokens, ratio 3:4; write to ml-team@example.com.",
    ],
)
def test_an_ordinary_sentence_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_control_characters_and_lines_become_one_line() -> None:
    assert clean("a\x1b[31mb\r\nc\x00\x9bd\n") == "a [31mb c d"


def test_a_long_text_ends_with_an_ellipsis_at_the_limit() -> None:
    assert clean("x" * 2000) == "x" * 1023 + "…"
    assert clean("x" * 20, 10) == "x" * 9 + "…"


@settings(derandomize=True)
@given(st.text(max_size=3000), st.integers(1, 2000))
def test_any_text_becomes_one_line_within_the_limit(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    assert not any(character < " " or "\x7f" <= character <= "\x9f" for character in cleaned)


# What a container may write into its termination message is 4,096 bytes long, and the operator has one thread.
@pytest.mark.parametrize(
    "piece",
    ["://", "://a:", "--token", "token='", "password ", "\\", "A1a/", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "a%:b", "basic "],
)
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()
    clean((piece * 4096)[:4096])
    assert time.process_time() - began < 1

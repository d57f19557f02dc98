"""redaction.py: no credential of a container's text ends in a status, and ordinary words stay readable."""

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
    ],
)
def test_a_secret_never_survives(text: str) -> None:
    assert SECRET not in clean(text)


def test_an_access_key_id_keeps_only_its_kind() -> None:
    assert clean("key AKIAIOSFODNN7EXAMPLE is unknown") == "key AKIA*** is unknown"


@pytest.mark.parametrize(
    "text",
    [
        "The Secret finetune-credentials-for-s3 does not exist; make it, or correct credentials.secretName.",
        "hf://acme/model@0e9e39f: no such revision.",
        "s3://models/tiny: 403 for the key of Secret s3-keys-of-production.",
        "Expected 2048 tokens a row, found 4096.",
    ],
)
def test_an_ordinary_sentence_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_control_characters_and_lines_become_one_line() -> None:
    assert clean("a\x1b[31mb\r\nc\x00\x9bd\n") == "a [31mb c d"


def test_a_long_text_ends_with_an_ellipsis_at_the_limit() -> None:
    assert clean("x" * 2000) == "x" * 1023 + "…"
    assert clean("x" * 20, 10) == "x" * 9 + "…"


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=3000), st.integers(1, 2000))
def test_any_text_becomes_one_line_within_the_limit(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    assert not any(character < " " or "\x7f" <= character <= "\x9f" for character in cleaned)

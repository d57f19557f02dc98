"""diagnosis.py: what a user reads of a pod that wrote no termination message of ours."""

import pytest
from finetune_api import names
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.diagnosis import LOG_TAIL_BYTES, ending_of
from support.specs import minimal_spec

SPEC = FineTuneJobSpec.model_validate(minimal_spec())
SECRET = "CanarySecretKey0/abcdefghijkl+MNOPQRSTUV"


def sentence_after(log: str) -> str:
    """The sentence of a pod whose log ended so, as the kubelet hands it on."""
    tail = log.encode()[-LOG_TAIL_BYTES:].decode(errors="replace")
    terminated = {"exitCode": 1, "reason": "Error", "message": tail}
    pod = {"status": {"phase": "Failed", "containerStatuses": [{"name": names.CONTAINER, "state": {"terminated": terminated}}]}}
    return ending_of(pod, SPEC).sentence


def test_the_last_log_lines_are_told() -> None:
    assert sentence_after("one\ntwo\nthree\nfour\n").endswith("its last words: two three four")


@pytest.mark.parametrize("kept", range(len(SECRET)))
def test_a_secret_that_the_kubelet_cut_in_two_is_not_told(kept: int) -> None:
    rest = f" is the key, and then{' .' * LOG_TAIL_BYTES}"[: LOG_TAIL_BYTES - kept]
    sentence = sentence_after(f"AWS_SECRET_ACCESS_KEY={SECRET}{rest}")
    assert "is the key" in sentence
    assert not [SECRET[start : start + 6] for start in range(len(SECRET) - 5) if SECRET[start : start + 6] in sentence]


def test_a_secret_of_several_lines_is_not_told_by_its_last_ones() -> None:
    sentence = sentence_after(f"-----BEGIN PRIVATE KEY-----\nMIIE\n{SECRET}\n{SECRET}\n-----END PRIVATE KEY-----\n")
    assert "Canary" not in sentence
    assert "last words: ***" in sentence

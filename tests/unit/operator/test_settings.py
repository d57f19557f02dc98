"""settings.py: FINETUNE_OPERATOR_* parse, wrong ones end with a sentence, and the chart sets nothing that is not there."""

import re
from pathlib import Path

import pytest
import yaml
from finetune_operator import main
from finetune_operator.settings import Settings

CHART = Path(__file__).parents[3] / "charts" / "finetune-operator"
DEPLOYMENT = CHART / "templates" / "deployment.yaml"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
PREFIX = "FINETUNE_OPERATOR_"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("trainer_image", "registry.example.com/trainer:1", "registry.example.com/trainer:1"),
        ("trainer_env", '{"HF_ENDPOINT": "https://hub.example.com"}', {"HF_ENDPOINT": "https://hub.example.com"}),
        ("namespaces", '["ml", "lab"]', ("ml", "lab")),
        ("namespaces", "[]", ()),
        ("allowed_images", '["registry.example.com/*"]', ("registry.example.com/*",)),
        ("allowed_service_accounts", '["trainer-*"]', ("trainer-*",)),
        ("trainer_image_pull_policy", "Never", "Never"),
        ("trainer_image_pull_secrets", '["company"]', ("company",)),
        ("trainer_pod_labels", '{"sidecar.istio.io/inject": "false"}', {"sidecar.istio.io/inject": "false"}),
        ("trainer_pod_annotations", '{"karpenter.sh/do-not-disrupt": "true"}', {"karpenter.sh/do-not-disrupt": "true"}),
        ("trainer_ca_config_map", "company-ca", "company-ca"),
        ("trainer_ca_key", "bundle.pem", "bundle.pem"),
        ("gpu_runtime_classes", '["gpu"]', ("gpu",)),
        ("resync_seconds", "15", 15.0),
        ("concurrency", "2", 2),
        ("health_port", "0", 0),
        ("log_level", "DEBUG", "DEBUG"),
    ],
)
def test_a_variable_of_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    assert getattr(Settings(), name) == value


@pytest.mark.parametrize(
    ("name", "text"), [("resync_seconds", "0"), ("concurrency", "many"), ("log_level", "LOUD"), ("health_port", "70000")]
)
def test_a_wrong_setting_ends_the_operator_with_a_sentence_that_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", text)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert f"{PREFIX}{name.upper()}" in capsys.readouterr().err


def test_a_list_that_is_not_json_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(f"{PREFIX}NAMESPACES", "ml")
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert '"namespaces"' in capsys.readouterr().err


def test_every_variable_that_the_chart_sets_is_a_setting() -> None:
    names = set(re.findall(rf"\bname: ({PREFIX}[A-Z_]+)", DEPLOYMENT.read_text()))
    assert names
    assert names <= {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


def test_the_chart_and_an_operator_without_it_name_the_same_gpu_runtime_classes() -> None:
    assert tuple(VALUES["trainer"]["gpuRuntimeClasses"]) == Settings().gpu_runtime_classes


@pytest.mark.parametrize(
    ("image", "allowed"),
    [
        ("", True),
        ("registry.example.com/trainer:1", True),
        ("registry.example.com/lab/trainer:2", True),
        ("registry.example.com.attacker.example/lab/trainer:2", False),
        ("REGISTRY.example.com/lab/trainer:2", False),
        ("trainer", False),
    ],
)
def test_an_image_is_allowed_by_pattern_or_because_it_is_the_operators_own(image: str, allowed: bool) -> None:
    settings = Settings(trainer_image="registry.example.com/trainer:1", allowed_images=("registry.example.com/lab/*",))
    assert settings.allows_image(image) is allowed


@pytest.mark.parametrize(("name", "allowed"), [("", True), ("trainer-a", True), ("admin", False)])
def test_a_service_account_is_allowed_by_pattern(name: str, allowed: bool) -> None:
    assert Settings(allowed_service_accounts=("trainer-*",)).allows_service_account(name) is allowed


def test_nothing_is_allowed_by_default() -> None:
    assert not Settings().allows_image("registry.example.com/lab/trainer:2")
    assert not Settings().allows_service_account("trainer-a")

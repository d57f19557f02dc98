"""desired.py and volumes.py: the Job of a spec, against golden files and against what the restricted Pod Security Standard asks for."""

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import credentials, names
from finetune_api.exits import PERMANENT, ExitCode
from finetune_api.job import JobDescription
from finetune_api.validation import spec_problems
from finetune_operator.desired import PREFLIGHT_TTL_SECONDS, build_failure_rules, build_job, build_preflight_job
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Subject, read_subject
from support.simulated_cluster import SETTINGS, build_finetunejob, matches_rule, merged

Build = Callable[[Subject, Settings], Json]
GOLDEN = Path(__file__).parent / "golden"
FULL_SPEC: Json = {
    "model": {"source": "pvc://models/llama", "dtype": "bfloat16", "credentials": {"secretName": "model-keys"}},
    "dataset": {
        "source": "s3://corpora/rows.jsonl",
        "endpoint": "https://s3.example.com",
        "credentials": {"secretName": "s3-keys"},
        "format": "chat",
        "evaluation": {"source": "configmap://held-out/rows.jsonl"},
    },
    "lora": {"rank": 16, "alpha": 32, "targetModules": "q_proj,v_proj"},
    "quantization": {"scheme": "int4", "groupSize": 64, "qatPercent": 25},
    "training": {"epochs": 2, "batchSize": 8, "learningRate": "1e-4", "maxLength": 512, "seed": 7, "checkpointEvery": 10},
    "quality": {"maxLossIncreasePercent": "2"},
    "outputs": {
        "artifacts": ["adapter", "quantized"],
        "destinations": [
            {"uri": "s3://models/tiny", "endpoint": "https://s3.example.com", "credentials": {"secretName": "s3-keys"}},
            {"uri": "hf://acme/tiny", "private": True, "credentials": {"secretName": "hub-token"}},
        ],
    },
    "resources": {"gpus": 1, "memory": "64Gi", "cpu": "8"},
    "scheduling": {
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "batch",
        "runtimeClassName": "nvidia",
    },
    "pod": {"image": "registry.example.com/other:2", "imagePullSecrets": ["pull"], "serviceAccountName": "trainer"},
    "storage": {
        "cache": {"persistentVolumeClaim": "models"},
        "workspace": {"persistentVolumeClaim": "work"},
        "checkpoints": {"uri": "s3://models/checkpoints", "credentials": {"secretName": "s3-keys"}},
    },
    "runPolicy": {"rerun": "1", "backoffLimit": 5, "activeDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 60},
}


def subject_of(changes: Json) -> Subject:
    subject = read_subject(build_finetunejob(merged({"runPolicy": {"preflight": "Auto"}}, changes)))
    assert isinstance(subject, Subject)
    assert subject.problem == ""
    return subject


def job_of(changes: Json, settings: Settings = SETTINGS) -> Json:
    return build_job(subject_of(changes), settings)


def pod_of(changes: Json, settings: Settings = SETTINGS) -> Json:
    return dict(job_of(changes, settings)["spec"]["template"]["spec"])


def container_of(changes: Json, settings: Settings = SETTINGS) -> Json:
    (container,) = pod_of(changes, settings)["containers"]
    return dict(container)


def environment_of(changes: Json, settings: Settings = SETTINGS) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container_of(changes, settings)["env"]}


def volumes_of(changes: Json) -> dict[str, Any]:
    return {volume["name"]: volume for volume in pod_of(changes)["volumes"]}


def assert_golden(manifest: Json, file: Path) -> None:
    """Compares whole dicts and prints the difference; REGENERATE_GOLDEN=1 writes the file anew."""
    text = yaml.safe_dump(json.loads(json.dumps(manifest)), sort_keys=False, width=140)
    if os.environ.get("REGENERATE_GOLDEN") == "1":
        file.write_text(text)
    stored = file.read_text() if file.exists() else ""
    diff = "".join(difflib.unified_diff(stored.splitlines(True), text.splitlines(True), file.name, "built"))
    assert yaml.safe_load(stored) == manifest, f"REGENERATE_GOLDEN=1 accepts this difference:\n{diff}"


def test_the_full_spec_is_one_the_api_server_takes() -> None:
    assert spec_problems(FULL_SPEC, local=False) == []


def test_the_job_of_a_full_spec_is_the_golden_one() -> None:
    settings = Settings(trainer_image="registry.example.com/trainer:1", trainer_env={"HF_ENDPOINT": "https://hub.example.com"})
    assert_golden(job_of(FULL_SPEC, settings), GOLDEN / "job.yaml")


def test_the_job_of_the_smallest_spec_is_the_golden_one() -> None:
    assert_golden(job_of({}), GOLDEN / "minimal.yaml")


def test_building_twice_gives_the_same_bytes() -> None:
    assert json.dumps(job_of(FULL_SPEC)) == json.dumps(job_of(FULL_SPEC))


def test_disruptions_and_checkpoints_are_ignored_before_any_exit_code_fails_the_job() -> None:
    rules = build_failure_rules()
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob", "FailJob"]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert [rule["onExitCodes"]["values"] for rule in rules[1:]] == [[18], sorted(PERMANENT), [137]]


@pytest.mark.parametrize("code", [ExitCode.CAPACITY, ExitCode.INFRASTRUCTURE, ExitCode.NOT_PUBLISHED, 1, 139])
def test_what_may_pass_the_next_time_is_counted(code: int) -> None:
    pod = {"status": {"containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}}
    assert not any(matches_rule(rule, pod) for rule in build_failure_rules())


@pytest.mark.parametrize("changes", [{}, FULL_SPEC])
def test_the_pod_meets_the_restricted_pod_security_standard(changes: Json) -> None:
    pod = pod_of(changes)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "secret", "emptyDir", "ephemeral", "persistentVolumeClaim"}


def test_the_root_file_system_is_read_only() -> None:
    assert container_of({})["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("changes", [{}, FULL_SPEC])
def test_no_service_account_token_is_mounted(changes: Json) -> None:
    assert pod_of(changes)["automountServiceAccountToken"] is False


def test_each_secret_is_an_optional_volume_with_only_the_accepted_keys() -> None:
    volumes = volumes_of(FULL_SPEC)
    roles = ("model", "dataset", "checkpoints", "destination-0", "destination-1")
    for role in roles:
        secret = volumes[f"credentials-{role}"]["secret"]
        assert secret["optional"] is True
        assert [item["key"] for item in secret["items"]] == list(credentials.ACCEPTED_KEYS)
        assert all(item["key"] == item["path"] for item in secret["items"])


def test_credentials_are_mounted_read_only_and_never_become_environment_variables() -> None:
    container = container_of(FULL_SPEC)
    mounts = [mount for mount in container["volumeMounts"] if mount["name"].startswith("credentials-")]
    assert len(mounts) == 5
    assert all(mount["readOnly"] for mount in mounts)
    assert "envFrom" not in container
    assert all("valueFrom" not in item for item in container["env"])


def test_a_claim_is_one_volume_however_often_it_is_mounted() -> None:
    changes = {"model": {"source": "pvc://models/llama"}, "storage": {"cache": {"persistentVolumeClaim": "models"}}}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes_of(changes).values() if "persistentVolumeClaim" in volume]
    assert claims == ["models"]


def test_two_jobs_in_one_workspace_claim_have_folders_of_their_own() -> None:
    def folder(name: str) -> str:
        raw = build_finetunejob({"storage": {"workspace": {"persistentVolumeClaim": "work"}}}, name=name)
        (container,) = build_job(read_subject(raw), SETTINGS)["spec"]["template"]["spec"]["containers"]
        return str(next(mount["subPath"] for mount in container["volumeMounts"] if mount["mountPath"] == names.WORKDIR))

    assert folder("one") != folder("two")


def test_a_workspace_with_a_storage_class_is_a_generic_ephemeral_volume() -> None:
    workspace = volumes_of({"storage": {"workspace": {"storageClassName": "fast", "size": "7Gi"}}})["workspace"]
    claim = workspace["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("fast", "7Gi")


@pytest.mark.parametrize("changes", [{}, FULL_SPEC])
def test_every_mount_has_its_volume_and_every_volume_its_mount(changes: Json) -> None:
    pod = pod_of(changes)
    (container,) = pod["containers"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert len(paths) == len(set(paths))


def test_no_gpu_is_asked_for_when_gpus_is_0() -> None:
    assert "nvidia.com/gpu" not in json.dumps(container_of({"resources": {"gpus": 0}})["resources"])


def test_one_gpu_is_asked_for_when_gpus_is_1() -> None:
    resources = container_of({"resources": {"gpus": 1}})["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"


def test_memory_is_limited_and_the_cpu_is_not() -> None:
    resources = container_of({"resources": {"memory": "3Gi", "cpu": "1"}})["resources"]
    assert resources["requests"] == {"cpu": "1", "memory": "3Gi", "nvidia.com/gpu": "1"}
    assert resources["limits"] == {"memory": "3Gi", "nvidia.com/gpu": "1"}


def test_dollars_in_the_description_survive_the_kubelet() -> None:
    changes = {"outputs": {"destinations": [{"uri": "s3://models/$(HOME)/$$/$x"}]}}
    value = environment_of(changes)[names.ENV_JOB]
    assert "$" not in value.replace("$$", "")
    description = JobDescription.from_json(value.replace("$$", "$"))
    assert description.spec.outputs.destinations[0].uri == "s3://models/$(HOME)/$$/$x"


def test_the_description_holds_the_objects_identity_and_digests() -> None:
    subject = subject_of({})
    description = JobDescription.from_json(environment_of({})[names.ENV_JOB])
    assert (description.name, description.namespace, description.uid) == ("tiny", "ml", "uid-1")
    assert (description.run_digest, description.train_digest) == (subject.run.run_digest, subject.run.train_digest)
    assert description.in_cluster


def test_the_administrators_environment_never_hides_the_description() -> None:
    settings = Settings(trainer_env={names.ENV_JOB: "{}", "HF_ENDPOINT": "https://hub.example.com"})
    environment = environment_of({}, settings)
    assert environment[names.ENV_JOB] != "{}"
    assert environment["HF_ENDPOINT"] == "https://hub.example.com"


MESH = Settings(
    trainer_pod_labels={"sidecar.istio.io/inject": "false", names.LABEL_JOB: "stolen", "app.kubernetes.io/name": "web"},
    trainer_pod_annotations={"karpenter.sh/do-not-disrupt": "true"},
)


@pytest.mark.parametrize("build", [build_job, build_preflight_job])
def test_the_administrators_labels_and_annotations_are_on_every_pod_and_hide_none_of_the_operators(build: Build) -> None:
    plain, job = build(subject_of({}), SETTINGS), build(subject_of({}), MESH)
    template = job["spec"]["template"]["metadata"]
    assert template["labels"] == {"sidecar.istio.io/inject": "false", **plain["spec"]["template"]["metadata"]["labels"]}
    assert template["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
    assert job["metadata"] == plain["metadata"]


def test_a_pod_has_no_annotations_unless_the_administrator_wants_some() -> None:
    assert "annotations" not in job_of({})["spec"]["template"]["metadata"]


COMPANY_CA = Settings(trainer_ca_config_map="company-ca", trainer_ca_key="bundle.pem")


@pytest.mark.parametrize("build", [build_job, build_preflight_job])
def test_a_ca_bundle_is_mounted_and_every_client_is_told_of_it(build: Build) -> None:
    pod = build(subject_of({}), COMPANY_CA)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (volume,) = [item for item in pod["volumes"] if "configMap" in item]
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == volume["name"]]
    (item,) = volume["configMap"]["items"]
    assert (volume["configMap"]["name"], item["key"], mount["readOnly"]) == ("company-ca", "bundle.pem", True)
    told = {entry["name"] for entry in container["env"] if entry["value"] == f"{mount['mountPath']}/{item['path']}"}
    assert told == {"AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}


def test_a_missing_ca_bundle_keeps_the_pod_from_starting() -> None:
    """Clients that look for a file that is not there would say that a server can't be reached; the kubelet names the ConfigMap."""
    volumes = {volume["name"]: volume for volume in pod_of({}, COMPANY_CA)["volumes"]}
    assert "optional" not in volumes["ca-bundle"]["configMap"]


def test_without_a_ca_bundle_no_client_is_told_of_one() -> None:
    assert not {"AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"} & environment_of({}).keys()
    assert "ca-bundle" not in volumes_of({})


def test_the_administrators_environment_wins_over_the_ca_bundles() -> None:
    settings = COMPANY_CA.model_copy(update={"trainer_env": {"AWS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt"}})
    assert environment_of({}, settings)["AWS_CA_BUNDLE"] == "/etc/ssl/certs/ca-certificates.crt"


@pytest.mark.parametrize(
    ("own", "administrators", "expected"),
    [((), (), None), ((), ("company",), ["company"]), (("mine", "company"), ("company", "mirror"), ["mine", "company", "mirror"])],
)
@pytest.mark.parametrize("build", [build_job, build_preflight_job])
def test_the_administrators_pull_secrets_come_behind_the_jobs_own(
    build: Build, own: tuple[str, ...], administrators: tuple[str, ...], expected: list[str] | None
) -> None:
    job = build(subject_of({"pod": {"imagePullSecrets": list(own)}}), Settings(trainer_image_pull_secrets=administrators))
    secrets = job["spec"]["template"]["spec"].get("imagePullSecrets")
    assert (secrets and [item["name"] for item in secrets]) == expected


def test_the_operators_image_is_taken_when_the_spec_names_none() -> None:
    assert container_of({})["image"] == SETTINGS.trainer_image


def test_the_administrators_pull_policy_is_for_the_administrators_image() -> None:
    settings = Settings(trainer_image_pull_policy="Always", allowed_images=("*",))
    assert container_of({}, settings)["imagePullPolicy"] == "Always"
    assert "imagePullPolicy" not in container_of({"pod": {"image": "registry.example.com/other:2"}}, settings)
    assert "imagePullPolicy" not in container_of({})


def test_the_job_has_no_ttl_before_its_end_is_stored() -> None:
    assert "ttlSecondsAfterFinished" not in job_of(FULL_SPEC)["spec"]


def test_the_job_is_controlled_by_the_finetunejob_and_never_holds_up_its_deletion() -> None:
    (owner,) = job_of({})["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "name": "tiny",
        "uid": "uid-1",
        "controller": True,
        "blockOwnerDeletion": False,
    }


def test_the_labels_of_the_longest_name_are_label_values() -> None:
    raw = build_finetunejob(name="n" * 250 + "-1")
    job = build_job(read_subject(raw), SETTINGS)
    assert len(job["metadata"]["name"]) <= 63
    assert all(len(value) <= 63 for value in job["metadata"]["labels"].values())


def test_a_new_pod_comes_only_when_the_old_one_is_wholly_gone() -> None:
    assert job_of({})["spec"]["podReplacementPolicy"] == "Failed"


def test_a_live_edit_changes_neither_the_jobs_name_nor_its_labels() -> None:
    live = {"suspend": True, "backoffLimit": 9, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 1}
    before, after = job_of({}), job_of({"runPolicy": live})
    assert before["metadata"] == after["metadata"]


def preflight_pod_of(changes: Json, settings: Settings = SETTINGS) -> Json:
    return dict(build_preflight_job(subject_of(changes), settings)["spec"]["template"]["spec"])


def test_the_preflight_job_is_the_training_job_without_gpus() -> None:
    training, preflight = job_of(FULL_SPEC), build_preflight_job(subject_of(FULL_SPEC), SETTINGS)
    pod, container = preflight["spec"]["template"]["spec"], preflight["spec"]["template"]["spec"]["containers"][0]
    assert preflight["metadata"]["name"] == training["metadata"]["name"] + "-pre"
    assert preflight["spec"]["ttlSecondsAfterFinished"] == PREFLIGHT_TTL_SECONDS
    assert container["args"] == ["preflight"]
    assert container["resources"] == {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"memory": "64Gi"}}
    assert "runtimeClassName" not in pod
    same = training["spec"]["template"]["spec"]
    assert (pod["volumes"], pod["securityContext"], container["env"]) == (
        same["volumes"],
        same["securityContext"],
        same["containers"][0]["env"],
    )


@pytest.mark.parametrize(
    ("name", "kept"),
    [("gvisor", True), ("kata", True), ("kata-qemu-nvidia-gpu", True), ("nvidia", False), ("nvidia-cdi", False), ("nvidia-legacy", False)],
)
def test_preflight_stays_in_the_sandbox_that_the_job_asks_for_and_needs_no_gpu_runtime(name: str, kept: bool) -> None:
    pod = preflight_pod_of({"scheduling": {"runtimeClassName": name}, "model": {"trustRemoteCode": True}})
    assert pod.get("runtimeClassName") == (name if kept else None)


def test_the_administrator_says_which_runtime_classes_need_a_gpu_node() -> None:
    settings = Settings(gpu_runtime_classes=("gpu",))
    assert "runtimeClassName" not in preflight_pod_of({"scheduling": {"runtimeClassName": "gpu"}}, settings)
    assert preflight_pod_of({"scheduling": {"runtimeClassName": "nvidia"}}, settings)["runtimeClassName"] == "nvidia"


SELECTOR = {
    "kubernetes.io/arch": "amd64",
    "kubernetes.io/hostname": "gpu-7",
    "topology.kubernetes.io/zone": "eu-1b",
    "nvidia.com/gpu.product": "H100",
}


def test_without_a_claim_preflight_runs_on_any_node_of_the_architecture_and_the_place() -> None:
    wanted = {key: value for key, value in SELECTOR.items() if key != "nvidia.com/gpu.product"}
    assert preflight_pod_of({"scheduling": {"nodeSelector": SELECTOR}})["nodeSelector"] == wanted


@pytest.mark.parametrize(
    "claim",
    [
        {"storage": {"workspace": {"persistentVolumeClaim": "work"}}},
        {"storage": {"cache": {"persistentVolumeClaim": "models"}}},
        {"model": {"source": "pvc://models/llama"}},
        {"dataset": {"source": "pvc://rows/train.jsonl"}},
        {"dataset": {"evaluation": {"source": "pvc://rows/held-out.jsonl"}}},
        {"storage": {"workspace": {"storageClassName": "local-nvme"}}},
    ],
)
def test_a_claim_is_bound_where_preflight_runs_so_it_runs_where_the_training_may(claim: Json) -> None:
    assert preflight_pod_of({**claim, "scheduling": {"nodeSelector": SELECTOR}})["nodeSelector"] == SELECTOR


def test_preflight_asks_for_no_more_memory_than_the_job_may_have() -> None:
    preflight = build_preflight_job(subject_of({"resources": {"memory": "512Mi"}}), SETTINGS)
    resources = preflight["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert (resources["requests"]["memory"], resources["limits"]["memory"]) == ("512Mi", "512Mi")

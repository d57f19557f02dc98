"""The digests: what an edit changes, and the golden values that keep a new operator from training a fleet again."""

from copy import deepcopy
from random import Random
from typing import Any

import pytest
from finetune_api.digests import run_digest, train_digest
from finetune_api.fields import FieldClass, leaves
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import parse_spec
from hypothesis import given
from hypothesis import strategies as st
from support.mutations import OTHER_VALUES, all_leaf_paths, put, template_path
from support.specs import Spec, changed, full_spec, minimal_spec

CLASS_OF = {".".join(path): field_class for path, _, field_class in leaves(FineTuneJobSpec)}
PLAIN_LORA = changed(minimal_spec(), "quantization.scheme", "none")
TWO_DESTINATIONS = {"destinations": [{"uri": "s3://models/tiny"}, {"uri": "s3://models/copy"}]}

# Never change one of these: each is what a stored job's status says, and another value trains it again.
GOLDEN = [
    (
        "minimal",
        minimal_spec(),
        "7446f6a44877a0c85f031915c6fe95e7c935e930371bce5867051a5658aa43bb",
        "18a648fda484d161d8bae425b83d6218e3acc40e76a4a62ddc4ad97e78e2e34e",
    ),
    (
        "plain",
        PLAIN_LORA,
        "19f6f16010721c45bcbaa0736055022be480aac15922a4445f8cec9c9232e6e5",
        "b2dd751f7b0ea99dd117596ee95a1c674e9050d4fabbd24dff20d2befb5e7cf4",
    ),
    (
        "full",
        full_spec(),
        "d35d08a52f27d369e8e87aa1c6c9b644533b40d2f2483cd2ffdf71b07fb32df4",
        "93278784fcf634b5b00e86e9e65fc0db71d2bcc70ff274348ccbb760e276e5f1",
    ),
]


def digests(spec: Spec) -> tuple[str, str]:
    parsed = parse_spec(spec)
    return train_digest(parsed), run_digest(parsed)


def written_defaults(spec: Spec) -> dict[str, Any]:
    """Path -> default of every field below the sections that the spec leaves out."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value:
            for index, item in enumerate(value):
                walk(item, f"{path}.{index}")
        else:
            found[path] = value

    walk(parse_spec(spec).wire(defaults=True), "")
    return found


DEFAULTS = {path: value for path, value in written_defaults(minimal_spec()).items() if not path.endswith(("source", "uri")) or value == ""}


def shuffled(value: Any, random: Random) -> Any:
    if isinstance(value, list):
        return [shuffled(item, random) for item in value]
    if not isinstance(value, dict):
        return value
    keys = random.sample(sorted(value), len(value))
    return {key: shuffled(value[key], random) for key in keys}


@pytest.mark.parametrize(("spec", "train", "run"), [row[1:] for row in GOLDEN], ids=[row[0] for row in GOLDEN])
def test_a_digest_never_changes_between_versions(spec: Spec, train: str, run: str) -> None:
    assert digests(spec) == (train, run)


def test_every_field_has_another_value_to_test_with() -> None:
    assert {template_path(path) for path in OTHER_VALUES} == all_leaf_paths()


@pytest.mark.parametrize("path", OTHER_VALUES)
def test_an_edit_changes_the_digests_of_its_fields_class(path: str) -> None:
    before = put(minimal_spec(), "scheduling.tolerations", [{}]) if "tolerations" in path else minimal_spec()
    (old_train, old_run), (new_train, new_run) = digests(before), digests(put(before, path, OTHER_VALUES[path]))
    field_class = CLASS_OF[template_path(path)]
    assert (new_train != old_train) == (field_class is FieldClass.TRAIN)
    assert (new_run != old_run) == (field_class is not FieldClass.LIVE)


@given(st.sets(st.sampled_from(sorted(OTHER_VALUES))))
def test_any_edit_changes_the_digests_of_its_fields_classes(paths: set[str]) -> None:
    before = changed(minimal_spec(), "scheduling.tolerations", [{}])
    spec = before
    for path in sorted(paths):
        spec = put(spec, path, OTHER_VALUES[path])
    classes = {CLASS_OF[template_path(path)] for path in paths}
    (old_train, old_run), (new_train, new_run) = digests(before), digests(spec)
    assert (new_train != old_train) == (FieldClass.TRAIN in classes)
    assert (new_run != old_run) == bool(classes - {FieldClass.LIVE})


def test_there_are_defaults_to_write() -> None:
    assert len(DEFAULTS) >= 40


@given(st.sets(st.sampled_from(sorted(DEFAULTS))))
def test_writing_a_default_changes_no_digest(paths: set[str]) -> None:
    spec = minimal_spec()
    for path in sorted(paths):
        spec = changed(spec, path, DEFAULTS[path])
    assert digests(spec) == digests(minimal_spec())


@given(st.sampled_from(sorted(CLASS_OF)))
def test_an_empty_section_changes_no_digest(path: str) -> None:
    section = path.partition(".")[0]
    assert digests({section: {}} | minimal_spec()) == digests(minimal_spec())


@given(st.randoms(use_true_random=False))
def test_the_order_of_keys_changes_no_digest(random: Random) -> None:
    assert digests(shuffled(full_spec(), random)) == digests(full_spec())


def test_another_destination_trains_nothing_again() -> None:
    (old_train, old_run), (new_train, new_run) = digests(minimal_spec()), digests(changed(minimal_spec(), "outputs", TWO_DESTINATIONS))
    assert new_train == old_train
    assert new_run != old_run


def test_a_toleration_of_everything_is_another_run() -> None:
    assert digests(changed(minimal_spec(), "scheduling.tolerations", [{}]))[1] != digests(minimal_spec())[1]


def test_the_order_of_destinations_is_part_of_the_run() -> None:
    turned = deepcopy(full_spec())
    turned["outputs"]["destinations"].reverse()
    (old_train, old_run), (new_train, new_run) = digests(full_spec()), digests(turned)
    assert new_train == old_train
    assert new_run != old_run


def test_the_two_digests_of_a_job_differ() -> None:
    train, run = digests(minimal_spec())
    assert train != run
    assert len(train) == len(run) == 64

"""permissions.py: the chart's rules and the docs are what the table says, and the table holds nothing that it must not."""

from pathlib import Path

import pytest
import yaml
from finetune_operator.permissions import DOCS_FILE, JOBS, LEASE, RULE_FILES, Permission, build_rules, rules_yaml, with_table

WRITES = {"create", "update", "patch", "delete", "deletecollection"}
each_permission = pytest.mark.parametrize("item", [*JOBS, *LEASE], ids=lambda item: f"{item.verb} {item.resource}")


@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.name)
def test_the_charts_rules_are_the_tables(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == rules_yaml(RULE_FILES[path]), "run `make crd`"
    assert yaml.safe_load(text) == build_rules(RULE_FILES[path])


def test_the_docs_hold_the_table() -> None:
    page = DOCS_FILE.read_text(encoding="utf-8")
    assert page == with_table(page), "run `make crd`"
    assert all(item.why in page for item in (*JOBS, *LEASE))


def test_rules_say_exactly_what_the_table_says() -> None:
    allowed = [
        (group, resource, verb)
        for rule in build_rules(JOBS)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]
    assert sorted(allowed) == sorted((item.group, item.resource, item.verb) for item in JOBS)
    assert len(set(allowed)) == len(allowed)


@each_permission
def test_nothing_names_secrets_or_a_wildcard_and_everything_says_why(item: Permission) -> None:
    assert "*" not in (item.group, item.resource, item.verb)
    assert item.resource.partition("/")[0] != "secrets"
    assert item.why


def test_of_leases_only_the_operators_own_is_read_and_written() -> None:
    assert {item.verb: bool(item.name) for item in LEASE} == {"get": True, "create": False, "update": True}


@each_permission
def test_of_our_own_kind_only_the_status_is_written(item: Permission) -> None:
    assert item.verb not in WRITES or item.group != "finetune.dev" or item.resource == "finetunejobs/status"

"""A safetensors file with sorted metadata: the same bytes whatever the order was, and the same content."""

import json
from pathlib import Path

import torch
from finetune_trainer.canonical import sort_metadata
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.int8)}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def content(path: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in TENSORS}


@given(metadata=st.dictionaries(TEXT, TEXT, min_size=1, max_size=12))
def test_the_content_stays_and_the_bytes_are_always_the_same(metadata: dict[str, str], tmp_path_factory: object) -> None:
    path = tmp_path_factory.getbasetemp() / "canonical.safetensors"  # type: ignore[attr-defined]
    results = set()
    for _ in range(3):  # each time in another order
        save_file(TENSORS, path, metadata=metadata)
        before = content(path)
        sort_metadata(path)
        assert content(path) == before
        results.add(path.read_bytes())
    assert len(results) == 1


def test_the_metadata_is_sorted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={f"layer.{number:02}": "{}" for number in range(30)})
    sort_metadata(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == [f"layer.{number:02}" for number in range(30)]


def test_a_file_without_metadata_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    before = path.read_bytes()
    sort_metadata(path)
    assert path.read_bytes() == before

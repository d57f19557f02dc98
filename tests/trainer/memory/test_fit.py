"""The micro-batch: the largest that fits, the same for the same machine, and a refusal in one sentence where none does."""

from typing import Any

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import CapacityError
from finetune_trainer.memory import fit
from finetune_trainer.memory.estimate import FILLED, Lengths
from finetune_trainer.memory.fit import Place
from finetune_trainer.memory.gpus import CONTEXT_BYTES, GPU_BYTES
from finetune_trainer.plan import Plan, divisors
from hypothesis import given
from hypothesis import strategies as st
from support.run_contexts import refused, run_spec
from support.tiny_model import tiny_llama

CONFIG = tiny_llama().config
LENGTHS = Lengths(64, 64)


def spec(**more: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(run_spec(lora={"rank": 4}, **more))


def plan_of(batch: int, micro_batch: int) -> Plan:
    return Plan(10, 5, micro_batch, batch // micro_batch, 1)


@given(batch=st.integers(1, 4096), limit=st.integers(0, 5000), data=st.data())
def test_the_largest_micro_batch_that_fits_is_found(batch: int, limit: int, data: st.DataObject) -> None:
    plan = plan_of(batch, data.draw(st.sampled_from(divisors(batch))))
    found = plan.fitted(lambda rows: rows <= limit)
    allowed = [size for size in divisors(batch) if size <= min(limit, plan.micro_batch)]
    assert (found.micro_batch if found else None) == (max(allowed) if allowed else None)
    assert found is None or found.batch == batch


@given(batch=st.integers(1, 4096), data=st.data())
def test_halving_keeps_the_batch_and_ends_at_one_row(batch: int, data: st.DataObject) -> None:
    plan = plan_of(batch, data.draw(st.sampled_from(divisors(batch))))
    while plan.micro_batch > 1:
        smaller = plan.halved()
        assert smaller.micro_batch <= plan.micro_batch // 2
        assert smaller.batch == batch
        assert smaller.reduced
        plan = smaller


def test_less_memory_gives_a_smaller_micro_batch_and_the_same_memory_the_same() -> None:
    needed = fit.estimates_of(spec(), CONFIG, plan_of(8, 8), LENGTHS, on_gpu=False)
    for rows, keeps_codes in ((1, True), (4, False), (4, False), (8, False)):
        place = Place(int(needed(rows, keeps_codes).peak / FILLED) + 1, False, "here", "more")
        chosen, estimate = fit.fitted(spec(), CONFIG, plan_of(8, 8), LENGTHS, place)
        assert estimate == needed(rows, chosen.keeps_codes)
        assert chosen.micro_batch == rows
        assert chosen.keeps_codes is keeps_codes or needed(rows, False).peak == needed(rows, True).peak


def test_what_fits_nowhere_is_refused_with_the_estimate_and_three_ways_out() -> None:
    place = Place(100_000, False, "a pod with resources.memory 1Mi", "resources.memory")
    with refused(
        CapacityError, "1 row of 64 tokens needs", "resources.memory 1Mi", "training.maxLength", "model.dtype", "resources.memory)"
    ):
        fit.fitted(spec(), CONFIG, plan_of(8, 8), LENGTHS, place)


def test_a_place_that_nobody_knows_refuses_nothing() -> None:
    plan, _ = fit.fitted(spec(), CONFIG, plan_of(8, 8), LENGTHS, Place(None, True, "a GPU", ""))
    assert plan.micro_batch == 8


@pytest.mark.parametrize(
    ("resources", "on_gpu", "known"),
    [
        ({"gpus": 0, "memory": "4Gi"}, False, 3 * 2**30),
        ({"gpus": 1, "gpuType": "nvidia-l4"}, True, GPU_BYTES["nvidia-l4"] - CONTEXT_BYTES),
        ({"gpus": 1, "gpuType": "something-else"}, True, None),
        ({"gpus": 1}, True, None),
    ],
)
def test_a_pods_room_is_what_its_spec_promises(resources: dict[str, Any], on_gpu: bool, known: int | None) -> None:
    place = fit.promised_pod(spec(resources=resources))
    assert (place.on_gpu, place.room) == (on_gpu, known)


def test_a_pod_with_a_gpu_needs_memory_for_the_weights_as_well() -> None:
    _, needed = fit.fitted(spec(), CONFIG, plan_of(8, 8), LENGTHS, Place(None, True, "a GPU", ""))
    fit.require_host_memory(spec(resources={"memory": "2Gi"}), needed)
    with refused(CapacityError, "a pod with resources.memory 1Gi has 0.00 GB for them", "raise resources.memory or choose a smaller model"):
        fit.require_host_memory(spec(resources={"memory": "1Gi"}), needed)
    small = spec(resources={"memory": "1Gi"})
    wide = small.model_copy(update={"model": small.model.model_copy(update={"dtype": "float32"})})
    with refused(CapacityError, "raise resources.memory, set model.dtype to bfloat16 or choose"):
        fit.require_host_memory(wide, needed)


@pytest.mark.parametrize(
    ("times", "on_gpu", "holds"),
    [
        pytest.param(1.2, False, True, id="little more than the estimate"),
        pytest.param(3.0, False, False, id="plenty"),
        pytest.param(None, False, False, id="unknown"),
        pytest.param(1.2, True, False, id="a GPU's"),
    ],
)
def test_memory_is_held_to_the_estimate_where_it_is_not_plenty(
    times: float | None, on_gpu: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(fit.heap, "return_large_blocks", lambda: calls.append("held"))
    needed = fit.estimates_of(spec(), CONFIG, plan_of(1, 1), LENGTHS, on_gpu=on_gpu)(1, False)
    fit.hold_to_estimate(needed, Place(None if times is None else int(times * needed.peak), on_gpu, "here", "more"))
    assert bool(calls) is holds
    fit.hold_to_estimate(None, Place(1, False, "here", "more"))
    assert len(calls) == holds

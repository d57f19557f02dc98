"""Which backend a run takes, for every spec and machine: pure."""

from itertools import product

import pytest
from finetune_api.spec import Scheme
from finetune_trainer.backends import choose
from finetune_trainer.errors import SpecError

EVERYWHERE = list(product(Scheme, (True, False), (True, False)))


@pytest.mark.parametrize(("scheme", "gpu", "unsloth"), EVERYWHERE)
def test_auto_can_always_train(scheme: Scheme, gpu: bool, unsloth: bool) -> None:
    taken = choose("auto", scheme, gpu=gpu, unsloth=unsloth)
    assert choose(taken, scheme, gpu=gpu, unsloth=unsloth) == taken


@pytest.mark.parametrize("scheme", Scheme)
def test_auto_is_native_where_unsloth_is_not_installed(scheme: Scheme) -> None:
    assert choose("auto", scheme, gpu=True, unsloth=False) == choose("auto", scheme, gpu=False, unsloth=False) == "native"


@pytest.mark.parametrize("scheme", Scheme)
def test_on_a_gpu_auto_is_unsloth_for_plain_lora_and_native_for_quantization_aware_training(scheme: Scheme) -> None:
    assert choose("auto", scheme, gpu=True, unsloth=True) == ("unsloth" if scheme is Scheme.NONE else "native")


@pytest.mark.parametrize("gpu", [True, False])
def test_unsloth_that_is_not_installed_is_refused_with_the_file_that_has_it(gpu: bool) -> None:
    with pytest.raises(SpecError, match=r"training\.backend is unsloth, which is not installed here; .*requirements/unsloth\.txt"):
        choose("unsloth", Scheme.NONE, gpu=gpu, unsloth=False)


def test_native_is_refused_where_its_loss_has_no_kernel() -> None:
    with pytest.raises(SpecError, match=r"training\.backend is native, .*choose auto or unsloth"):
        choose("native", Scheme.INT8_INT4, gpu=False, unsloth=True)

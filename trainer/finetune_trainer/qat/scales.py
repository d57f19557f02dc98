"""Scales of least squared error: the factors of every exact layer, made once from the weights as they are, and kept for good.

Called at the switch to quantization-aware steps: the search is dear, and its result hardly changes with what an adapter still learns.
A pure function of base weights and adapter, so that a resumed run makes the same ones.
"""

from peft import PeftModel

from finetune_trainer.qat.linear import ExactLinear, adapted_weight
from finetune_trainer.qat.prepare import drop_caches, exact_layers


def fit_scales(model: PeftModel) -> None:
    """Gives every layer that export quantizes the factors of its merged weight; training, export and proof use them from now on.

    A rounding that was chosen for other scales (gptq.py) is forgotten.
    """
    for _, layer in exact_layers(model):
        fit_layer(layer)
    drop_caches(model)


def fit_layer(layer: ExactLinear) -> None:
    """The same for one layer; whoever calls it drops the caches."""
    layer.exact.rounding_offset = None
    layer.exact.clip_ratio = layer.exact.quantizer.least_squares_clip_ratio(adapted_weight(layer))

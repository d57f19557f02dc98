"""The quantizers: grids for weights and for activations, each serving fake quantization and export alike.

One file a grid. Each gives the numbers of the torchao 0.18 tensor class that is shipped, bit for bit (tested): the order of the operations is
the contract, since another order rounds differently. Must not know about modules, adapters or autograd.
"""

from finetune_trainer.qat.quantizers.activations import ActivationCodes, ActivationQuantizer
from finetune_trainer.qat.quantizers.weights import WeightCodes, WeightGrid, WeightQuantizer

__all__ = ["ActivationCodes", "ActivationQuantizer", "WeightCodes", "WeightGrid", "WeightQuantizer"]

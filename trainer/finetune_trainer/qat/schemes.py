"""The quantization schemes, as one table: grids, group size, where each converts and serves, bytes on disk.

Read by preflight (which refuses what this machine can't convert), prepare, convert and the report. Imports torch only inside functions,
so that preflight can say no before torch is loaded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_api.spec import QuantizationSpec, Scheme

from finetune_trainer.errors import CapacityError

if TYPE_CHECKING:
    from finetune_trainer.qat.quantizers import WeightQuantizer


@dataclass(frozen=True)
class SchemeInfo:
    """One row of the table.

    Attributes:
        weight_bits: bits of the weight grid.
        default_group: weights that share a scale along the input dimension; None is one scale per output channel.
        int8_activations: whether activations are quantized too (int8, asymmetric, per token).
        converts_on: where a model of this scheme can be made; empty when this version makes none.
        serves_on: where the exported file runs.
        bytes_per_weight: on disk, scales included.
    """

    weight_bits: int
    default_group: int | None
    int8_activations: bool
    converts_on: str
    serves_on: str
    bytes_per_weight: float


SCHEMES: dict[Scheme, SchemeInfo] = {
    # One int8 code and, for each output channel, a float scale and an int8 zero point.
    Scheme.INT8: SchemeInfo(8, None, False, "any CPU or GPU", "any CPU or GPU", 1.01),
    # torchao's unpacked tensors hold one int8 for each weight, also on a 4-bit grid.
    Scheme.INT8_INT4: SchemeInfo(4, 32, True, "any CPU or GPU", "any CPU (ExecuTorch included) or GPU", 1.16),
    Scheme.INT4: SchemeInfo(4, 128, False, "", "an NVIDIA GPU with the mslk kernels", 0.53),
    Scheme.FP8_INT4: SchemeInfo(4, 128, False, "", "an NVIDIA GPU of compute capability 9.0 (H100, H200)", 0.53),
    Scheme.FP8_FP8: SchemeInfo(8, None, False, "", "an NVIDIA GPU of compute capability 8.9 or newer (L4, L40S, H100)", 1.01),
}


def require_convertible(scheme: Scheme) -> None:
    """Refuses a scheme that can't be converted here, before anything is trained.

    Raises:
        CapacityError: names the scheme, where its models run, and the schemes that convert anywhere.
    """
    if scheme is Scheme.NONE or SCHEMES[scheme].converts_on:
        return
    able = " or ".join(item.value for item, info in SCHEMES.items() if info.converts_on)
    raise CapacityError(
        f"spec.quantization.scheme is {scheme.value}, which runs on {SCHEMES[scheme].serves_on}, but this version can't convert to it yet, here or there; "
        f"choose {able}, which convert on any machine."
    )


def weight_quantizer(spec: QuantizationSpec) -> "WeightQuantizer":
    """The one quantizer that serves fake quantization and export of this job's weights."""
    from finetune_trainer.qat.quantizers import WeightQuantizer

    info = SCHEMES[spec.scheme]
    group = (spec.group_size or info.default_group) if info.default_group else None
    return WeightQuantizer(bits=info.weight_bits, group_size=group)


def torchao_config(spec: QuantizationSpec) -> Any:
    """torchao's own configuration of the scheme, as `config.json` of the exported folder names it."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    quantizer = weight_quantizer(spec)
    granularity = PerGroup(quantizer.group_size) if quantizer.group_size else PerAxis(0)
    dtype = {4: torch.int4, 8: torch.int8}[quantizer.bits]
    if SCHEMES[spec.scheme].int8_activations:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)

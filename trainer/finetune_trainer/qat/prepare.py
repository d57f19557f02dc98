"""Turns a peft model's linear layers into exact ones, in place, and switches them: the interface of train, evaluate and convert.

Every linear that export will quantize is taken: those with an adapter and the frozen ones. The output head, embeddings, the towers of a multimodal
model and layers whose input size does not divide into groups are not quantized and are listed; such layers with an adapter are computed merged, as export has them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from finetune_api.spec import QuantizationSpec, Scheme
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

from finetune_trainer.errors import SpecError
from finetune_trainer.language_model import bypassed_linears, foreign_linears
from finetune_trainer.qat.fit import best_fit
from finetune_trainer.qat.linear import ExactFrozenLinear, ExactLinear, ExactLoraLinear, ExactMode, ExactState
from finetune_trainer.qat.schemes import SCHEMES

_HEAD, _FOREIGN, _OWN_WAY = "output head", "not part of the language model", "computes in a way of its own"
_BYPASSED = "has a weight that is read past the layer"
_NO_PLAIN_FORWARD = (_OWN_WAY, _BYPASSED)
_FUSED_DIMENSIONS = 3  # [experts, out, in]


@dataclass(frozen=True)
class Prepared:
    """What was made exact.

    Attributes:
        layers: names of the exact layers, as the merged model knows them (without peft's prefixes).
        skipped: linear layers that stay unquantized, with the reason.
        coverage: share of the language model's linear weights (the output head aside) that are quantized, 0 to 1.
        group_size: weights that share one scale; None is one scale for each output channel.
    """

    layers: tuple[str, ...]
    skipped: dict[str, str]
    coverage: float
    group_size: int | None

    @property
    def sentence(self) -> str:
        """For the user: how much is quantized, and which linear layers are not."""
        kept = f"; not quantized: {', '.join(sorted(self.skipped))}" if self.skipped else ""
        groups = f", in groups of {self.group_size}" if self.group_size else ""
        return f"{len(self.layers)} linear layers are quantized ({self.coverage:.0%} of the linear weights{groups}){kept}."


def prepare(model: PeftModel, quantization: QuantizationSpec, *, enabled: bool = True) -> Prepared:
    """Makes every linear exact that export will quantize, and switches off the base model's own dropout, which no exported model has.

    Args:
        model: a peft model with one LoRA adapter, not merged.
        quantization: scheme and group size; the scheme is not `none`.
        enabled: whether fake quantization is on from now on.

    Raises:
        SpecError: LoRA dropout, DoRA or another LoRA variant, an adapter on what is no plain linear layer, layers that share a weight, or less than half of the linear weights fit the scheme.
    """
    _switch_off_dropout(model.get_base_model())
    _compute_as_quantized(model.get_base_model())
    layers = {plain_name(path): (module, _base(module)) for path, module in _linears(model)}
    outside = _outside(model, {name: base for name, (_, base) in layers.items()})
    shapes = {name: (base.out_features, base.in_features) for name, (_, base) in layers.items() if name not in outside}
    own_way = sum(layers[name][1].weight.numel() for name, reason in outside.items() if reason in _NO_PLAIN_FORWARD)
    found = best_fit(quantization, shapes, _fused(model) + own_way)
    _require_own_weights({name: base for name, (_, base) in layers.items() if name not in outside})
    _require_linear_adapters(model)  # behind the fit: of a mixture whose attention is too small, fewer adapters would be no mend
    mode = ExactMode(enabled=enabled)
    scheme = SCHEMES[quantization.scheme]
    quantizer = scheme.quantizer(found.group_size)
    for name, (module, _) in layers.items():
        if name in shapes and name not in found.unfit:
            _make_exact(module, ExactState(mode, quantizer, scheme.activations), name)
        elif isinstance(module, LoraLinear):
            _require_plain_forward(name, outside)
            _make_exact(module, ExactState(mode, None, None), name)
    model.register_load_state_dict_post_hook(lambda *_: mode.drop_caches())
    skipped = outside | found.unfit
    return Prepared(tuple(name for name in layers if name not in skipped), skipped, found.coverage, found.group_size)


def serving_note(model: PeftModel, scheme: Scheme) -> str:
    """What to know before the model is trained in this dtype; empty where the scheme's kernels take it."""
    wanted, dtype = SCHEMES[scheme].served_in, model.get_base_model().dtype
    if wanted is None or dtype == wanted:
        return ""
    names = [str(item).removeprefix("torch.") for item in (wanted, dtype)]
    return f"The kernels that serve {scheme.value} compute in {names[0]}, but this model is {names[1]}; set model.dtype to {names[0]} to serve it by them."


def exact_layers(model: nn.Module) -> Iterator[tuple[str, ExactLinear]]:
    """(name in the merged model, layer) of every layer that export quantizes."""
    return ((name, layer) for name, layer in _prepared_layers(model) if layer.exact.quantizer is not None)


def merged_layers(model: nn.Module) -> Iterator[tuple[str, ExactLinear]]:
    """(name in the merged model, layer) of every adapted layer that export merges but does not quantize."""
    return ((name, layer) for name, layer in _prepared_layers(model) if layer.exact.quantizer is None)


def group_size_of(model: nn.Module) -> int | None:
    """Weights that share one scale in a prepared model; None is one scale for each output channel."""
    return next(layer.exact.quantizer.group_size for _, layer in exact_layers(model) if layer.exact.quantizer)


def mode_of(model: nn.Module) -> ExactMode | None:
    """The switch that a prepared model's layers share; None for a model that was not prepared."""
    return next((layer.exact.mode for _, layer in exact_layers(model)), None)


def set_fake_quantization(model: nn.Module, enabled: bool) -> None:
    """Switches fake quantization of every exact layer; nothing for a model that was not prepared."""
    mode = mode_of(model)
    if mode is not None:
        mode.enabled = enabled


@contextmanager
def fake_quantization(model: nn.Module, enabled: bool, *, keep_codes: bool = False) -> Iterator[None]:
    """Fake quantization on or off within the block; `keep_codes` quantizes each weight once for all its batches."""
    mode = mode_of(model)
    if mode is None:
        yield
        return
    before = mode.enabled, mode.keep_codes
    mode.enabled, mode.keep_codes = enabled, keep_codes
    try:
        yield
    finally:
        mode.enabled, mode.keep_codes = before
        if not mode.keep_codes:
            free_codes(model)


def drop_caches(model: nn.Module, *, frozen: bool = True) -> None:
    """Weights may have changed (a load, a resume, an edit of `.data`): forget what was computed from them."""
    mode = mode_of(model)
    if mode is not None:
        mode.drop_caches(frozen=frozen)


def follow_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
    """Drops the adapted layers' caches after each step of the optimizer; fused optimizers don't bump the version of a weight."""
    return optimizer.register_step_post_hook(lambda *_: drop_caches(model, frozen=False))


def plain_name(path: str) -> str:
    """A module's name as the merged model knows it."""
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def _prepared_layers(model: nn.Module) -> Iterator[tuple[str, ExactLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, ExactLoraLinear | ExactFrozenLinear):
            yield plain_name(path), module


def _switch_off_dropout(base: nn.Module) -> None:
    """Modules, and the numbers that modules and configurations hold for the functional kind; LoRA's own dropout is refused, not switched off."""
    modules = [module for path, module in base.named_modules() if ".lora_" not in path]
    configs = [module.config for module in modules if isinstance(getattr(module, "config", None), PreTrainedConfig)]
    for holder in (*modules, *configs):
        if isinstance(holder, _DropoutNd):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):  # attention_dropout, resid_pdrop, layerdrop, drop_path_rate
                setattr(holder, name, 0.0)


def _compute_as_quantized(base: nn.Module) -> None:
    """As transformers marks a model that it loads quantized: some, such as Falcon Mamba, only then call each layer."""
    for module in base.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._is_quantized = True


def _linears(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) or (isinstance(module, nn.Linear) and ".lora_" not in path and not path.endswith(".base_layer")):
            yield path, module


def _outside(model: PeftModel, linears: dict[str, nn.Linear]) -> dict[str, str]:
    """Layers that no scheme takes, with the reason."""
    base, outside = model.get_base_model(), dict[str, str]()
    head, foreign = base.get_output_embeddings(), set(foreign_linears(base))
    with model.disable_adapter():  # some kinds of adapter read the weight by themselves
        bypassed = {plain_name(name) for name in bypassed_linears(base)}
    for name, linear in linears.items():
        if linear is head:
            outside[name] = _HEAD
        elif name in foreign:
            outside[name] = _FOREIGN
        elif name in bypassed:
            outside[name] = _BYPASSED  # such as Mamba's dt_proj
        elif type(linear).forward is not nn.Linear.forward:
            outside[name] = (
                _OWN_WAY  # such as Falcon's, which transposes its weight: torchao's tensors can't, and the shipped model would not run
            )
    return outside


def _require_plain_forward(name: str, outside: dict[str, str]) -> None:
    if (reason := outside.get(name)) in _NO_PLAIN_FORWARD:
        raise SpecError(
            f"spec.lora.targetModules: {name} {reason}, so exact quantization-aware training could not merge its adapter; leave it out, or choose scheme none."
        )


def _fused(model: PeftModel) -> int:
    """Weights of linear maps that are no layers: the experts of a mixture, which share tensors [experts, out, in]."""
    own = (item for module in model.modules() if not isinstance(module, nn.Conv1d) for item in module.parameters(recurse=False))
    return sum(parameter.numel() for parameter in own if parameter.dim() == _FUSED_DIMENSIONS)


def _require_own_weights(layers: dict[str, nn.Linear]) -> None:
    """Layers that share a weight, such as Zamba's attention, get an adapter each: merged they differ, and the exported model would tie them again."""
    first: dict[int, str] = {}
    for name, linear in layers.items():
        other = first.setdefault(id(linear.weight), name)
        if other != name:
            raise SpecError(
                f"spec.quantization: the layers {other} and {name} of this model share one weight, which no scheme can quantize; choose scheme none."
            )


def _require_linear_adapters(model: PeftModel) -> None:
    """Whatever else has an adapter would be trained and not exported: the proof would say so, but only behind the training."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, LoraLinear):
            raise SpecError(
                f"spec.lora.targetModules: LoRA on {plain_name(path)} trains what is no linear layer ({type(module.get_base_layer()).__name__}), such as "
                "the experts of a mixture or an embedding, which no scheme quantizes; name the linear layers of the attention alone, or choose scheme none."
            )


def _base(module: nn.Module) -> nn.Linear:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear):
        raise SpecError(f"Exact quantization-aware training needs nn.Linear layers, but found {type(base).__name__}; choose scheme none.")
    return base


def _make_exact(module: nn.Module, state: ExactState, name: str) -> None:
    if isinstance(module, LoraLinear):
        _require_plain_lora(module, name)
        module.__class__ = ExactLoraLinear
    else:
        module.__class__ = ExactFrozenLinear
    module.exact = state  # type: ignore[assignment]


def _require_plain_lora(module: LoraLinear, name: str) -> None:
    if any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in module.lora_dropout.values()):
        raise SpecError(
            f"LoRA dropout on {name} does not fit exact quantization-aware training, which merges before it quantizes; set it to 0."
        )
    if module.lora_variant:
        raise SpecError(f"DoRA or another LoRA variant on {name} does not fit exact quantization-aware training; use plain LoRA.")
    if module.fan_in_fan_out:
        raise SpecError(
            f"{name} stores its weight transposed, which exact quantization-aware training does not handle; choose scheme none."
        )


def free_codes(model: nn.Module, *, frozen: bool = False) -> None:
    """Frees the weight codes that adapted layers keep between micro-batches (with `frozen` also those that frozen layers keep for good)."""
    for _, layer in exact_layers(model):
        if frozen or isinstance(layer, ExactLoraLinear):
            layer.exact.cached, layer.exact.cached_key = None, ()

"""One cell of `make bench-quality`: one training of SmolLM2-135M off its grid, from the product's own parts, and what it does on held-out rows.

Can be stopped at any time: the state of every tenth step is kept in the cache under the history that led to it, so that the same command goes on,
and trainings whose first steps are the same share them. The result does not depend on where a training was stopped.
"""

import dataclasses
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_api.spec import LoraSpec, QuantizationSpec
from finetune_trainer.adapter import add_adapter
from finetune_trainer.batch import pad
from finetune_trainer.held_out import HeldOut, measure
from finetune_trainer.qat.gptq import calibration_rows, choose_rounding
from finetune_trainer.qat.prepare import exact_layers, follow_optimizer, mode_of, prepare, set_fake_quantization
from finetune_trainer.qat.quantizers import WeightQuantizer
from finetune_trainer.qat.quantizers.integers import SymmetricGrid
from finetune_trainer.qat.scales import fit_scales
from finetune_trainer.row_order import micro_batches
from finetune_trainer.schedule import rate_factor
from finetune_trainer.teacher import Adapter, adapter_values, in_place, teacher_hidden
from finetune_trainer.token_loss import output_head, predict, summed_loss
from peft import PeftModel
from quality_data import Rows, rows
from quality_model import rotated_model
from quality_table import PTQ
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP, ROWS_PER_STEP, HELD_OUT = 32, 16, 240
_TOKENS_AT_ONCE, _SAVE_EVERY = 1024, 10


@dataclass(frozen=True)
class Recipe:
    """How a cell is trained.

    Attributes:
        method: lora, split (torchao's fake quantization of base weights and factors apart) or exact.
        bits: of the weight grid; 0 for lora.
        switch: steps before exact QAT.
        distill: weight of the divergence from the adapter at the switch.
        adapt_peak: peak of the steps behind the switch, as a multiple of the first; 0 is one cosine over both phases.
        least_squares: scales of least squared error, else of the largest value.
        rounding: whether the rounding is chosen by what the layers compute, wherever scales are fitted; else each weight goes to the nearest value.
        refit: steps between two fits of the scales to the adapter as it is, a multiple of 10; 0 is once, at the switch.
        temperature: both models' logits are divided by it in the divergence, which is multiplied by its square.
    """

    data: str
    seed: int
    method: str
    bits: int = 0
    steps: int = 100
    switch: int = 0
    distill: float = 0.5
    adapt_peak: float = 0.0
    rank: int = 32
    peak: float = 1e-3
    least_squares: bool = True
    rounding: bool = False
    refit: int = 0
    temperature: float = 1.0


@dataclass
class State:
    """A training after some steps.

    Attributes:
        teacher: the adapter at the switch; None before it.
        fitted: the adapter that scales and rounding are fitted to.
    """

    step: int
    adapter: Adapter
    optimizer: dict[str, Any]
    teacher: Adapter | None
    fitted: Adapter | None
    seconds: float
    cpu_seconds: float


class Paused(Exception):  # noqa: N818 no error
    """The time is up; the same call goes on."""


def make(recipe: Recipe, cache: Path, say: Callable[[str], None], until: float = math.inf) -> dict[str, Any]:
    """Trains the cell, or goes on with it, and measures it; the result as JSON values.

    Args:
        recipe: which one.
        cache: where states are kept.
        say: is told of each step.
        until: clock time (time.time) after which no step is begun.

    Raises:
        Paused: the time is up, and what was done is kept.
    """
    folder = rotated_model(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = rows(recipe.data, recipe.seed, recipe.steps * ROWS_PER_STEP, HELD_OUT, tokenizer)
    training = _Training(recipe, folder, data, cache, say)
    final = training.run(until)
    say("measuring")
    measured = _measure(recipe, folder, data, final)
    training.forget()
    return {
        "rows": {"digest": data.digest, "train": len(data.train), "heldOut": len(data.held_out)},
        "seconds": round(final.seconds, 1),
        "cpuSeconds": round(final.cpu_seconds, 1),
        "tokens": [example.trained_tokens for example in data.held_out],
        "losses": {name: [round(total, 4) for total, _ in found.rows] for name, found in measured.items()},
        "agreement": _agreement(measured),
    }


class _Training:
    def __init__(self, recipe: Recipe, folder: Path, data: Rows, cache: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.data, self.say = recipe, data, say
        self.states = cache / "quality" / "states"
        self.model = _model(recipe, folder)
        self.head = output_head(self.model.get_base_model())
        self.factors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.factors, lr=recipe.peak, weight_decay=0.0, fused=True)
        follow_optimizer(self.model, self.optimizer)
        self.saved: Path | None = None
        self.history = [_step_facts(recipe, step) for step in range(recipe.steps)]

    def run(self, until: float) -> State:
        state = self._newest()
        self._enter(state)
        while state.step < self.recipe.steps:
            loss = self._timed_step(state)
            self.say(f"step {state.step}/{self.recipe.steps}: loss {loss:.4f}, {state.seconds:.0f} s, {state.cpu_seconds:.0f} CPU s")
            if state.step % _SAVE_EVERY == 0 or self._stays(state.step) or state.step == self.recipe.steps:
                self._save(state)
                if time.time() > until:
                    raise Paused
        state.adapter = adapter_values(self.model)
        return state

    def forget(self) -> None:
        """Removes the state of the last step: the cell is measured."""
        self._path(self.recipe.steps).unlink(missing_ok=True)

    def _adapts(self, step: int) -> bool:
        return self.recipe.method == "exact" and step >= self.recipe.switch

    def _adapt(self, state: State) -> None:
        """At the switch, and wherever scales are fitted again."""
        first = state.teacher is None
        if first:
            state.teacher = adapter_values(self.model)
        if first or (self.recipe.refit and (state.step - self.recipe.switch) % self.recipe.refit == 0):
            state.fitted = adapter_values(self.model)
            self._fit(state.fitted)

    def _fit(self, adapter: Adapter) -> None:
        if self.recipe.least_squares:
            with in_place(self.model, adapter):
                _fit_quantizers(self.model, self.recipe, self.data)
        set_fake_quantization(self.model, enabled=True)

    def _timed_step(self, state: State) -> float:
        started, cpu = time.perf_counter(), _cpu_seconds()
        if self._adapts(state.step):
            self._adapt(state)
        loss = self._step(state)
        state.step += 1
        state.seconds += time.perf_counter() - started
        state.cpu_seconds += _cpu_seconds() - cpu
        return loss

    def _step(self, state: State) -> float:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.peak * _factor(recipe, state.step)
        drawn = self.data.train[state.step * ROWS_PER_STEP : (state.step + 1) * ROWS_PER_STEP]
        tokens = sum(example.trained_tokens for example in drawn)
        cut = micro_batches([len(example.input_ids) for example in drawn], _TOKENS_AT_ONCE)
        batches = [[drawn[row] for row in rows] for rows in cut]
        mode = mode_of(self.model)
        if mode is not None:
            mode.keep_codes = len(batches) > 1
        total = 0.0
        for examples in batches:
            loss = self._loss(pad(examples, 0), state.teacher) / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.factors, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, batch: dict[str, torch.Tensor], teacher: Adapter | None) -> torch.Tensor:
        weight, temperature = self.recipe.distill, self.recipe.temperature
        taught = teacher_hidden(self.model, teacher, batch) if teacher is not None and weight else None
        predicted = predict(self.model.get_base_model(), **batch)
        if taught is None or temperature == 1:
            return summed_loss(self.head, predicted, taught, weight)
        softer = summed_loss(lambda hidden: self.head(hidden) / temperature, predicted, taught, 1.0)
        return (1 - weight) * summed_loss(self.head, predicted) + weight * temperature**2 * softer

    def _newest(self) -> State:
        for step in range(self.recipe.steps, 0, -1):
            path = self._path(step)
            if path.is_file():
                self.say(f"going on from step {step}")
                self.saved = None if self._stays(step) else path
                return State(**torch.load(path, weights_only=True))
        return State(0, adapter_values(self.model), {}, None, None, 0.0, 0.0)

    def _enter(self, state: State) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(state.adapter[name])
        if state.optimizer:
            self.optimizer.load_state_dict(state.optimizer)
        if state.fitted is not None:
            self._fit(state.fitted)

    def _save(self, state: State) -> None:
        """Each state makes room for the next, unless another training may turn off there."""
        state.adapter, state.optimizer = adapter_values(self.model), self.optimizer.state_dict()
        self.states.mkdir(parents=True, exist_ok=True)
        path = self._path(state.step)
        torch.save({field.name: getattr(state, field.name) for field in dataclasses.fields(state)}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        if self.saved is not None:
            self.saved.unlink(missing_ok=True)
        self.saved = None if self._stays(state.step) else path

    def _stays(self, step: int) -> bool:
        return step == (self.recipe.steps // 2 if self.recipe.method == "lora" else self.recipe.switch)

    def _path(self, step: int) -> Path:
        facts = [self.data.digest, dataclasses.asdict(self.recipe) | dict.fromkeys(_HISTORY_SAYS, None), self.history[:step]]
        return self.states / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]}-{step}.pt"


_HISTORY_SAYS = ("method", "bits", "switch", "distill", "adapt_peak", "peak", "least_squares", "rounding", "refit", "temperature")


def _step_facts(recipe: Recipe, step: int) -> list[Any]:
    """All that decides what a step does, besides data and rank."""
    rate = recipe.peak * _factor(recipe, step)
    if recipe.method == "lora" or (recipe.method == "exact" and step < recipe.switch):
        return ["lora", rate]
    return [recipe.method, rate, recipe.bits, recipe.distill, recipe.temperature, recipe.least_squares, recipe.rounding, recipe.refit]


def _factor(recipe: Recipe, step: int) -> float:
    return rate_factor(step, recipe.steps, recipe.switch, 3, recipe.adapt_peak)


def _model(recipe: Recipe, folder: Path) -> PeftModel:
    torch.manual_seed(recipe.seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = add_adapter(base, LoraSpec(rank=recipe.rank))
    model.train()
    if recipe.method == "exact":
        _prepare_exact(model, recipe.bits)
    if recipe.method == "split":
        fake_quantize_apart(model, recipe.bits)
    return model


def _prepare_exact(model: PeftModel, bits: int) -> None:
    """As the product prepares int8-int4, with a grid of fewer bits where asked for."""
    prepare(model, QuantizationSpec(), enabled=False)
    for _, layer in exact_layers(model):
        layer.exact.quantizer = WeightQuantizer(SymmetricGrid(bits), GROUP)


def fake_quantize_apart(model: PeftModel, bits: int) -> None:
    """torchao's own QAT on every linear, as unsloth applies it: base weights and LoRA factors, each by itself."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    grid = Int8DynamicActivationIntxWeightConfig(weight_dtype={3: torch.int3, 4: torch.int4}[bits], weight_granularity=PerGroup(GROUP))
    quantize_(model, QATConfig(grid, step="prepare"), lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)


def _measure(recipe: Recipe, folder: Path, data: Rows, final: State) -> dict[str, HeldOut]:
    """Held-out rows under every model that this training gives."""
    measured: dict[str, HeldOut] = {}
    if recipe.method == "split":
        model = _model(recipe, folder)
        with in_place(model, final.adapter):
            measured["as trained"] = measure(model, data.held_out, fake_quant=False)
        return measured | {"quantized": _quantized(folder, recipe, recipe.bits, final.adapter, data)}
    if recipe.method == "lora":
        model = _model(recipe, folder)
        with model.disable_adapter():
            measured["base"] = measure(model, data.held_out, fake_quant=False)
        with in_place(model, final.adapter):
            measured["tuned"] = measure(model, data.held_out, fake_quant=False)
        for bits in (4, 3):
            for kind in PTQ:
                chosen = dataclasses.replace(recipe, rounding=kind == "rounding")
                found = _quantized(folder, chosen, bits, final.adapter, data, fitted_to=final.adapter if kind != "largest" else None)
                measured[f"ptq {bits} {kind}"] = found
        return measured
    if final.teacher is None:
        raise ValueError("an exact training ends behind its switch")
    if recipe.switch:
        model = _model(recipe, folder)
        with in_place(model, final.teacher):
            measured["at the switch"] = measure(model, data.held_out, fake_quant=False)
    fitted_to = final.fitted if recipe.least_squares else None
    return measured | {"quantized": _quantized(folder, recipe, recipe.bits, final.adapter, data, fitted_to=fitted_to)}


def _quantized(folder: Path, recipe: Recipe, bits: int, adapter: Adapter, data: Rows, fitted_to: Adapter | None = None) -> HeldOut:
    model = _model(dataclasses.replace(recipe, method="exact", bits=bits), folder)
    parameters = dict(model.named_parameters())
    for values in (fitted_to, adapter):
        if values is None:
            continue
        for name, value in values.items():
            parameters[name].data.copy_(value)
        if values is fitted_to:
            _fit_quantizers(model, recipe, data)
    return measure(model, data.held_out, fake_quant=True)


def _fit_quantizers(model: PeftModel, recipe: Recipe, data: Rows) -> None:
    """As phases.py does at the switch."""
    if recipe.rounding:
        choose_rounding(model, calibration_rows(data.train))
    else:
        fit_scales(model)


def _agreement(measured: dict[str, HeldOut]) -> dict[str, float]:
    """Share of trained places where a model's most likely token is the unquantized one's."""
    reference = measured.get("tuned") or measured.get("at the switch")
    if reference is None:
        return {}
    return {
        name: round(sum(one == two for one, two in zip(found.greedy, reference.greedy, strict=True)) / len(reference.greedy), 4)
        for name, found in measured.items()
        if found is not reference and name != "base"
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

"""Trials of a prepared model before its first step: whatever the proof would find at the end of a training shall be found before it, where it can.

Called by stages/train.py; convert.py takes the logits of the trained model from here.
"""

import torch
from peft import PeftModel

from finetune_trainer.errors import ProofError, SpecError
from finetune_trainer.qat.prepare import fake_quantization


def require_effect(model: PeftModel, input_ids: torch.Tensor) -> None:
    """Refuses a preparation that does nothing, and a model that still draws random numbers in training mode.

    With fake quantization on, the logits must differ from those without, and be the same from call to call.

    Args:
        model: a prepared model.
        input_ids: [1, tokens].

    Raises:
        ProofError: fake quantization changes nothing.
        SpecError: the same call in training mode gives other logits.
    """
    plain, quantized, again = (training_logits(model, input_ids, fake_quant=enabled) for enabled in (False, True, True))
    if not torch.allclose(quantized, again, rtol=0, atol=0, equal_nan=True):  # NaN is the loss's business, not a random number
        raise SpecError(
            "spec.model.source: this model gives other logits at every call in training mode, even with its dropout switched off, so no exported "
            "model could be proved equal to it; choose another model, or quantization scheme none."
        )
    if torch.equal(plain, quantized):
        raise ProofError(
            "Fake quantization changes nothing, so nothing would be learnt from it: this is a defect of the trainer, please report it."
        )


def require_served_function(model: PeftModel, input_ids: torch.Tensor) -> None:
    """Refuses a model that computes another function in training mode than in evaluation mode, in which the exported model serves and is proved.

    Args:
        model: a prepared model.
        input_ids: [1, tokens].

    Raises:
        SpecError: such as RWKV, which divides its weights where it serves.
    """
    trained, served = (_logits(model, input_ids, None, fake_quant=True, training=training) for training in (True, False))
    if not torch.allclose(trained, served, rtol=0, atol=0, equal_nan=True):
        raise SpecError(
            f"spec.model.source: this model computes other logits in training mode than where it serves (the largest difference is {(trained - served).abs().max():.3g}), "
            "so the exported model could not be proved equal to the trained one; try model.dtype float32, choose another model or quantization scheme none, or accept it "
            "with quantization.acceptInexact."
        )


def training_logits(
    model: PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, fake_quant: bool = True
) -> torch.Tensor:
    """Full logits in training mode, without autocast: with fake quantization what the exported model must compute."""
    return _logits(model, input_ids, attention_mask, fake_quant=fake_quant, training=True)


@torch.no_grad()
def _logits(
    model: PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, fake_quant: bool, training: bool
) -> torch.Tensor:
    before = model.training
    model.train(training)
    try:
        with fake_quantization(model, enabled=fake_quant):
            logits: torch.Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        model.train(before)
    return logits

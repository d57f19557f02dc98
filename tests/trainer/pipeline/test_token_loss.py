"""The chunked loss is the dense formula, in value and gradient, whatever the chunks, in the memory of one; and it knows what architectures do to their logits."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from finetune_trainer import token_loss
from finetune_trainer.base_model import cast_last_hidden_state
from finetune_trainer.batch import pad
from finetune_trainer.errors import DataError
from finetune_trainer.example import IGNORED, Example
from finetune_trainer.memory.tracking import LiveBytes
from finetune_trainer.token_loss import Head, Prediction, output_head, predict, require_own_logits, summed_loss, token_losses
from support.tiny_model import tiny_llama
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

TOKENS, FEATURES, VOCABULARY = 23, 8, 31


@pytest.fixture(params=[1, 7, 1000])
def _tokens_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_LOGITS_AT_ONCE", request.param * VOCABULARY)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ drawn(FEATURES, VOCABULARY, seed=1)


@pytest.mark.usefixtures("_tokens_at_once")
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_the_dense_formula(weight: float) -> None:
    hidden, taught = drawn(TOKENS, FEATURES, seed=2).requires_grad_(), drawn(TOKENS, FEATURES, seed=3)
    labels = torch.arange(TOKENS) % VOCABULARY
    ours = summed_loss(head, Prediction(hidden, labels), taught, weight) / 7
    (gradient,) = torch.autograd.grad(ours, hidden)
    probabilities = head(taught).softmax(-1)
    divergence = (probabilities * (probabilities.log() - head(hidden).log_softmax(-1))).sum()
    dense = ((1 - weight) * F.cross_entropy(head(hidden), labels, reduction="sum") + weight * divergence) / 7
    (expected,) = torch.autograd.grad(dense, hidden)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_tokens_at_once")
def test_without_a_teacher_it_is_cross_entropy() -> None:
    hidden, labels = drawn(TOKENS, FEATURES, seed=2).requires_grad_(), torch.arange(TOKENS)
    dense = F.cross_entropy(head(hidden), labels, reduction="none")
    torch.testing.assert_close(summed_loss(head, Prediction(hidden, labels)), dense.sum(), rtol=1e-12, atol=1e-12)
    losses, greedy = token_losses(head, Prediction(hidden, labels))
    torch.testing.assert_close(losses, dense.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(greedy, head(hidden).argmax(-1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens `counting_head` was asked for, in each call; a piece is of seven."""
    monkeypatch.setattr(token_loss, "_LOGITS_AT_ONCE", 7 * VOCABULARY)
    return []


def counting_head(asked: list[int]) -> Head:
    def counted(hidden: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden))
        return head(hidden)

    return counted


@pytest.mark.parametrize("taught", [False, True])
def test_neither_model_is_projected_for_more_tokens_than_a_piece_has(taught: bool, asked: list[int]) -> None:
    hidden, labels = drawn(TOKENS, FEATURES, seed=2).requires_grad_(), torch.arange(TOKENS)
    teacher = drawn(TOKENS, FEATURES, seed=3) if taught else None
    summed_loss(counting_head(asked), Prediction(hidden, labels), teacher, 0.5).backward()
    pieces = [size for size in (7, 7, 7, 2) for _ in range(1 + taught)]
    assert asked == [1, *pieces]  # the first asks for the size of the vocabulary


def test_losses_of_each_token_are_measured_piece_by_piece(asked: list[int]) -> None:
    token_losses(counting_head(asked), Prediction(drawn(TOKENS, FEATURES, seed=2), torch.arange(TOKENS)))
    assert asked == [1, 7, 7, 7, 2]


def test_all_that_a_taught_loss_needs_at_once_is_less_than_one_models_logits() -> None:
    tokens, vocabulary = 2000, 50_000
    project = torch.ones(FEATURES, vocabulary)
    hidden, teacher, labels = torch.ones(tokens, FEATURES, requires_grad=True), torch.ones(tokens, FEATURES), torch.arange(tokens)
    with LiveBytes() as tracker:
        summed_loss(lambda item: item @ project, Prediction(hidden, labels), teacher, 0.5).backward()
    assert 0 < tracker.peak < tokens * vocabulary * project.element_size()
    assert hidden.grad is not None


def test_a_teacher_that_is_the_student_leaves_no_divergence() -> None:
    hidden = drawn(TOKENS, FEATURES, seed=2).requires_grad_()
    loss = summed_loss(head, Prediction(hidden, torch.zeros(TOKENS, dtype=torch.long)), hidden.detach(), 1.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(float(loss.detach())) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


def test_a_batch_without_a_trained_token_costs_nothing_and_teaches_nothing() -> None:
    hidden = drawn(0, FEATURES, seed=2).requires_grad_()
    loss = summed_loss(head, Prediction(hidden, torch.zeros(0, dtype=torch.long)), hidden.detach(), 0.5)
    assert float(loss.detach()) == 0
    loss.backward()


def test_only_trained_tokens_are_predicted() -> None:
    model = tiny_llama(dtype=torch.float64)
    batch = pad([Example((5, 6, 7, 8), (IGNORED, 6, IGNORED, 8)), Example((9, 4), (IGNORED, 4))], 2)
    found = predict(model, **batch)
    assert found.labels.tolist() == [6, 8, 4]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(output_head(model)(found.hidden), logits[[0, 0, 1], [0, 2, 0]])


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    ],
    ids=["Gemma caps", "Cohere multiplies", "Granite divides"],
)
def test_the_head_does_to_logits_what_the_architecture_does(model: object) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model().eval()  # type: ignore[operator]
    input_ids = torch.arange(1, 9)[None]
    hidden = made.base_model(input_ids=input_ids).last_hidden_state[0]
    torch.testing.assert_close(output_head(made)(hidden), made(input_ids=input_ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "own"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)), True),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)), True),
        (
            lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, lru_width=32, logits_soft_cap=0.1)),
            False,
        ),
        (
            lambda: ModernBertDecoderForCausalLM(
                ModernBertDecoderConfig(**{key: value for key, value in SMALL.items() if "key" not in key})
            ),
            False,
        ),
    ],
    ids=["Gemma caps", "Mamba's hidden state is float32", "a cap of another name", "layers in front of the head"],
)
def test_a_model_whose_logits_are_made_in_another_way_is_refused(
    model: Callable[[], PreTrainedModel], own: bool, dtype: torch.dtype
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model().to(dtype)
    cast_last_hidden_state(made)
    with nullcontext() if own else pytest.raises(DataError, match=rf"can't be trained: {type(made).__name__} makes its logits otherwise"):
        require_own_logits(made, torch.arange(3, 20)[None])
    assert made.training

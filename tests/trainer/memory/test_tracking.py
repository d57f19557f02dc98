"""LiveBytes: every storage once, from the operation that returns it until it is freed."""

import torch
from finetune_trainer.memory.tracking import LiveBytes

KILO = 256  # floats of a kilobyte


def test_a_tensor_counts_as_long_as_it_lives() -> None:
    with LiveBytes() as tracker:
        kept = torch.zeros(KILO)
        passing = torch.ones(3 * KILO)
        assert (tracker.live, tracker.peak) == (4096, 4096)
        del passing
        assert (tracker.live, tracker.peak) == (1024, 4096)
    assert kept.numel() == KILO


def test_views_and_operations_in_place_take_nothing() -> None:
    with LiveBytes() as tracker:
        tensor = torch.zeros(KILO)
        view = tensor.view(2, -1).T
        view.add_(1)
        assert tracker.live == 1024


def test_what_the_backward_pass_keeps_is_alive_until_it_has_run() -> None:
    with LiveBytes() as tracker:
        weight = torch.ones(KILO, requires_grad=True)
        loss = weight.exp().sum()
        assert tracker.live >= 2 * 1024
        loss.backward()
        del loss
        assert tracker.live == 2 * 1024  # the weight and its gradient


def test_a_peak_can_be_forgotten() -> None:
    with LiveBytes() as tracker:
        torch.zeros(KILO)
        tracker.restart()
        assert tracker.peak == 0

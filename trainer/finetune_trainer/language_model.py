"""Which linear layers of a model text passes through: where an adapter would be trained, and where a quantized weight would be what the model computes with.

Used by adapter.py and qat/prepare.py. The others: the towers of other senses in a multimodal model, whose adapter would see no gradient and whose
scales no row has shown, and layers whose weight the model's code reads by itself, past whatever stands in the layer's place.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

_TOKENS = 8


def foreign_linears(base: PreTrainedModel) -> list[str]:
    """Names of the linear layers outside the language model, its output head aside; none in a model of text alone."""
    if base.config.get_text_config() is base.config:
        return []
    passed = {id(module) for module in (*base.get_decoder().modules(), base.get_output_embeddings())}
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and id(module) not in passed]


@torch.no_grad()
def bypassed_linears(base: PreTrainedModel) -> list[str]:
    """Names of the linear layers whose weight is read or changed while they are not called, such as Mamba's dt_proj; found in a forward pass of either mode.

    The output head aside, whose weight may be the embedding's. None in a model that can't be run as it stands, such as one on the meta device whose code looks at values.
    """
    head = base.get_output_embeddings()
    linears = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head}
    reads = _Reads(linears.values())
    input_ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=base.device)
    try:
        for training in (False, True):  # in this order, RWKV takes back in training mode what evaluation mode does to its weights
            with _mode(base, training), reads.watching():
                base(input_ids=input_ids, use_cache=False)
    except Exception:  # noqa: BLE001 whatever it is, training will say it
        return []
    return [name for name, module in linears.items() if id(module.weight) in reads.past_layer]


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In that mode within the block; dropout leaves no trace in the random state."""
    before, devices = model.training, list(range(torch.cuda.device_count()))
    model.train(training)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.train(before)


class _Reads(TorchFunctionMode):
    """Sees every operation within the block.

    Attributes:
        past_layer: ids of the weights that an operation took while no layer of theirs was being called.
    """

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        super().__init__()
        self._layers = list(layers)
        self._weights = {id(layer.weight) for layer in self._layers}
        self._called: list[int] = []
        self.past_layer: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks, self:
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(self._enter).remove)
                hooks.callback(layer.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, layer: nn.Module, *_: object) -> None:
        self._called.append(id(layer.weight))

    def _leave(self, *_: object) -> None:
        self._called.pop()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if isinstance(returned, torch.Tensor):  # and not its dtype or its shape
            taken = {id(item) for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)}
            self.past_layer |= (taken & self._weights).difference(self._called)
        return returned

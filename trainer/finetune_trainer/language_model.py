"""Which layers of a model text passes: of a multimodal one its language model, without the towers of other senses and their projectors.

Used by adapter.py and qat/prepare.py: such a layer would get an adapter that sees no gradient, and scales that no row has shown.
"""

from torch import nn
from transformers import PreTrainedModel


def foreign_linears(base: PreTrainedModel) -> list[str]:
    """Names of the linear layers outside the language model, its output head aside; none in a model of text alone."""
    if base.config.get_text_config() is base.config:
        return []
    passed = {id(module) for module in (*base.get_decoder().modules(), base.get_output_embeddings())}
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and id(module) not in passed]

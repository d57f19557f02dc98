"""mslk's names for FBGEMM's GenAI kernels: mslk is what they were moved to, and has no wheel on the package index yet.

On PYTHONPATH, with fbgemm-gpu-genai of the torch version at hand (1.6 for torch 2.11), torchao serves Int4Tensor through the same kernels.
"""

import fbgemm_gpu.experimental.gen_ai  # noqa: F401 loads the library
import torch

__version__ = "1.0.0"

_LIBRARY = torch.library.Library("mslk", "FRAGMENT")
for _name in ("bf16i4bf16_rowwise", "f8i4bf16_rowwise", "f8f8bf16_rowwise"):
    _kernel = getattr(torch.ops.fbgemm, _name)
    _LIBRARY.define(str(_kernel.default._schema).removeprefix("fbgemm::"))
    _LIBRARY.impl(_name, _kernel.default, "CUDA")

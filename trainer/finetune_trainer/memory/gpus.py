"""The memory of common GPUs by the names that Kubernetes nodes carry, for `resources.gpuType` and `finetune estimate --gpu`.

None is older than compute capability 7.5: the image's PyTorch, for CUDA 13, has no code for a V100.
Whole MiB as nvidia-smi reports them, from public listings; **none of them has been measured here**.
"""

MIB = 2**20

GPU_BYTES: dict[str, int] = {
    "nvidia-tesla-t4": 15_360 * MIB,
    "nvidia-a10g": 23_028 * MIB,
    "nvidia-l4": 23_034 * MIB,
    "nvidia-tesla-a100": 40_960 * MIB,
    "nvidia-l40s": 46_068 * MIB,
    "nvidia-h100-80gb": 81_559 * MIB,
    "nvidia-a100-80gb": 81_920 * MIB,
    "nvidia-h200-141gb": 143_771 * MIB,
    "nvidia-b200": 183_359 * MIB,
}

CONTEXT_BYTES = 2**30  # what CUDA and its libraries take for themselves; not yet measured on a GPU

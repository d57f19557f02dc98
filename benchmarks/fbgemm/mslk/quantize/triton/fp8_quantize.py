"""Activations."""

from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_row as quantize_fp8_row

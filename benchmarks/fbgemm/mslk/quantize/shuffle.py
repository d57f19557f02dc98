"""Weights."""

from fbgemm_gpu.experimental.gen_ai.quantize import int4_row_quantize as int4_row_quantize
from fbgemm_gpu.experimental.gen_ai.quantize import int4_row_quantize_zp as int4_row_quantize_zp
from fbgemm_gpu.experimental.gen_ai.quantize import pack_int4 as pack_int4
from fbgemm_gpu.experimental.gen_ai.quantize import quantize_int4_preshuffle as quantize_int4_preshuffle

"""Exact quantization-aware training: the forward pass of training computes the function of the exported model, bit for bit."""

"""How far a kernel may be from its reference: absolute, for inputs of size 1."""

import torch

ATTENTION_CPU = 1e-5
WEIGHTS_CPU = 2e-6
"""Of a softmax: sums of at most 14 weights."""
ATTENTION = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1e-2}
"""In Triton, by the query's dtype, in which products are made (of zipped blocks in float16 instead of bfloat16)."""
WEIGHTS = 1e-5
"""Of a softmax, in Triton."""
DECODED = 1e-5
CELL = 1e-3
"""Distance from a border between cells, in cells, at which a code may be its neighbour."""

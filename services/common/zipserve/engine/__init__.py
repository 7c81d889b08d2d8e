"""Runs any Hugging Face causal language model over a KV cache of sealed blocks: load, forward, sample.

Its tokens are those of many sequences as one packed row; attention is ours (`attention.py`), and on the CPU the linear
layers too, fused where the family is known (`startup.py`). One thread, the device thread, owns all of it.
"""

import os

# A thread that waits for others at a barrier spins this often, some tens of microseconds, and then sleeps. The OpenMP
# runtime's own choice is many milliseconds, in which it keeps the very threads that it waits for from a shared core.
# It is read when torch loads the runtime, which is after this module.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

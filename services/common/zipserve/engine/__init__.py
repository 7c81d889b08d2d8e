"""Runs any Hugging Face causal language model over a KV cache of sealed blocks: load, forward, sample.

An unmodified module computes the tokens of many sequences as one packed row; only its attention is ours
(`attention.py`). One thread, the device thread, owns all of it.
"""

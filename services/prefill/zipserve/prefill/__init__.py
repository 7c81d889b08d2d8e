"""The prefill service: computes prompts and offers their KV under leases."""

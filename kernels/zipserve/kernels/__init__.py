"""Operations on KV blocks, one folder each: a plain reference, a CPU kernel in C, a Triton kernel."""

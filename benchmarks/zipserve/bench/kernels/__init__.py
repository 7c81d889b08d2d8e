"""How fast the operations on KV blocks are, beside their references, SDPA, and the machine's bandwidth."""

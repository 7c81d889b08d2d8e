"""How fast KV moves between two processes, beside raw NIXL and memcpy."""

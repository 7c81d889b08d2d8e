"""The KV store: shared blocks, found by the hash of the tokens they cover. It holds none yet."""

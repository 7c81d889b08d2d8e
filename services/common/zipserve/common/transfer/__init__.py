"""The two ends of a KV handoff: `source` leases slabs out, `puller` reads and verifies them."""

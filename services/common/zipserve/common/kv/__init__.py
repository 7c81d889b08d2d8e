"""The KV handoff without a device: layouts, slab headers, handles, leases, slab allocation. Pure, except for the clock
and the random numbers that are passed in."""

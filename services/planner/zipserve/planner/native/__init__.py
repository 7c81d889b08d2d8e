"""Our own cluster: how long its steps take, and what it makes of a workload."""

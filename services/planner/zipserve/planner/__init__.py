"""Plans a deployment: how many devices prefill and how many decode, in which parallelism, for the most goodput per device.

A discrete-event simulation of both phases, driven by measured step times, ranks the placements (DistServe, OSDI'24).
"""

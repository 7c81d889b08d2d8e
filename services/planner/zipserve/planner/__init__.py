"""Plans a deployment: which devices prefill and which decode, in what parallelism, for the most goodput per device.

A discrete-event simulation of both phases, driven by measured step times, ranks the placements (DistServe, OSDI'24).
"""

"""How the simulation is compiled."""

from numba import njit

compiled = njit(nogil=True, error_model="numpy", _nrt=False, forceinline=True)

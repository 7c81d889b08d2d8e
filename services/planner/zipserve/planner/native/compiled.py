"""How the simulation is compiled.

Its arrays are handed from function to function, some twenty at a time, which takes longer than most of what these do.
So all is compiled into one function (`forceinline`). Nothing is allocated in it, and the compiler is told (`_nrt`):
else it counts references to every array, each time with an atomic operation. Only that one function is called from
Python: the others need no wrappers, which would take half of the time to compile.
"""

from typing import Any

from numba import njit

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
"""Of the function that is called from Python."""
_PARTS: dict[str, Any] = {**OPTIONS, "forceinline": True, "no_cpython_wrapper": True}

compiled = njit(**_PARTS)

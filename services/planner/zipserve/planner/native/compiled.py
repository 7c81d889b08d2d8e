"""How the simulation is compiled.

Its arrays are handed from function to function, some twenty at a time, which takes longer than most of what these do.
So all is compiled into one function (`forceinline`); that nothing is allocated in it is told the compiler, which else
counts references to every array, each time with an atomic operation (`_nrt`). Only that one function is called from
Python, so that the others need no wrappers, which take most of the time to compile.
"""

from typing import Any

import numba

njit: Any = numba.njit  # its stubs do not know all that it takes

OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}

compiled = njit(**OPTIONS, forceinline=True, no_cpython_wrapper=True)

"""Measures zipserve: `zipserve bench NAME`. Every benchmark is a package here, and ends with its bars."""

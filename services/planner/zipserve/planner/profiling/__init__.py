"""`zipserve profile`: learns from a running cluster how fast its workers are."""

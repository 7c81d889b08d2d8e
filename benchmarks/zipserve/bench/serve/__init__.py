"""`zipserve bench serve`: an endpoint under a load that does not wait for it."""

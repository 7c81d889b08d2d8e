"""`zipserve bench goodput`: arrangements of the same cores under the same load, and the rate that each bears."""

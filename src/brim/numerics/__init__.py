"""How numbers are stored: formats, granularity, reference encoding. `formats` and `represent` need no torch."""

"""How much memory: closed form, meter of tensor lifetimes, meters of real runs. Steps are passed in, never imported."""

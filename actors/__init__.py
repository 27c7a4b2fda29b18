"""Ray actors around merge_core, and the pool that talks to them."""

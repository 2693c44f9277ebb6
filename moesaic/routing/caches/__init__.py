"""Cache simulations: hit rates of expert caches of every size at once, one policy a file."""

"""Short things to copy. A package, so that a config can name `examples.own_algorithm.ib_erm.IBERM`."""

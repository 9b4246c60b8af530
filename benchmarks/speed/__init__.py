"""Every measurement of speed and memory. Nothing of the product imports it."""

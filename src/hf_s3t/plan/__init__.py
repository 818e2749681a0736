"""Which stages exist, in which order they are trained, what they cost and what survives a deletion. No torch."""

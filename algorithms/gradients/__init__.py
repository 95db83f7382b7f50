"""Many objectives kept apart up to their gradients: inner products over ranks, weights, and their combination."""

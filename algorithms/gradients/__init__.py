"""Gradients of several objectives: their inner products over ranks, their weights, and their weighted sum."""

"""Preference losses on text and images, pairs of answers, and worse images."""

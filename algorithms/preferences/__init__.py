"""What is learned from answers that were preferred or labelled: losses on text and images, pairs, and worse images."""

"""Training: how the shipped weights were made (:mod:`moe3d.training.shipped`)."""

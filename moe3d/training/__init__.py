"""Training: one trainer (:mod:`~moe3d.training.trainer`), and what is built on it.

A step, from the bottom up: :mod:`~moe3d.training.views` picks and fits frames, :mod:`~moe3d.training.scenes` draws
them by the step's number, :mod:`~moe3d.training.networks` joins a model (or, with :mod:`~moe3d.training.features`, its
head alone on cached features) with the losses of a recipe (:mod:`~moe3d.training.recipes`), and the trainer takes it,
with :mod:`~moe3d.training.checkpoint`, :mod:`~moe3d.training.validate` and :mod:`~moe3d.training.logbook` around it.

- ``moe3d train``: :mod:`~moe3d.training.runs`.
- ``python -m moe3d.training.study``: MoE3D's effect in miniature; heads from cached features
  (:mod:`~moe3d.training.heads`).
- ``python -m moe3d.training.shipped``: how the shipped weights were made. Only its first stage has a loop of its own,
  :mod:`~moe3d.training.pretrain`: a network from scratch within a budget of minutes.
"""

"""``make gpu``: everything that needs a GPU, in one command, on a machine without a network.

``python -m bench.gpu`` works through :data:`bench.gpu.stages.STAGES`, the most valuable first, each in a process of its
own: a crash, a fault on the GPU or a hang costs one item, and a new process goes on. Every result is in the JSON file
as soon as it is had; a second run takes up where the first one ended. Without a GPU it says what it would have done.
"""

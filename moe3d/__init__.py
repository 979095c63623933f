"""moe3d: mixture-of-experts depth heads for feed-forward 3D reconstruction."""

from moe3d._version import __version__ as __version__

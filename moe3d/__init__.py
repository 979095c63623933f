"""moe3d: mixture-of-experts depth heads for feed-forward 3D reconstruction, made real and fast.

The way down: :func:`patch_vggt` -> :class:`MoEHead` -> :func:`moe3d.functional.moe_head` -> the registered operator
(:mod:`moe3d.ops.schema`) -> a backend chosen by :mod:`moe3d.ops.dispatch` -> its kernels.
"""

from moe3d._checkout import install_finder as _install_finder
from moe3d._startup import take_over as _take_over  # noqa: F401
from moe3d._version import __version__ as __version__
from moe3d.functional import moe_head as moe_head
from moe3d.integrations import load_head as load_head
from moe3d.integrations import patch as patch
from moe3d.integrations import patch_da3 as patch_da3
from moe3d.integrations import patch_vggt as patch_vggt
from moe3d.integrations import save_head as save_head
from moe3d.integrations import unpatch as unpatch
from moe3d.integrations import unpatch_da3 as unpatch_da3
from moe3d.integrations import unpatch_vggt as unpatch_vggt
from moe3d.models import load_mini as load_mini
from moe3d.nn import MoEHead as MoEHead
from moe3d.ops.dispatch import backends as backends
from moe3d.ops.types import MoEOutput as MoEOutput

_install_finder()

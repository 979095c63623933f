"""Patching existing models: VGGT and its relatives, Depth Anything 3."""

from moe3d.integrations.da3 import patch_da3 as patch_da3
from moe3d.integrations.da3 import unpatch_da3 as unpatch_da3
from moe3d.integrations.head_file import load_head as load_head
from moe3d.integrations.head_file import save_head as save_head
from moe3d.integrations.kinds import patch as patch
from moe3d.integrations.kinds import patched_heads as patched_heads
from moe3d.integrations.kinds import unpatch as unpatch
from moe3d.integrations.vggt import patch_vggt as patch_vggt
from moe3d.integrations.vggt import unpatch_vggt as unpatch_vggt

"""Patching existing models: VGGT and its relatives."""

from moe3d.integrations.head_file import load_head as load_head
from moe3d.integrations.head_file import save_head as save_head
from moe3d.integrations.vggt import patch_vggt as patch_vggt
from moe3d.integrations.vggt import patched_heads as patched_heads
from moe3d.integrations.vggt import unpatch_vggt as unpatch_vggt

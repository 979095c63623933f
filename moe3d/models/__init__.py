"""MiniVGGT, the embedded small model with VGGT's interface."""

from moe3d.models.checkpoint import load_mini as load_mini
from moe3d.models.checkpoint import save_mini as save_mini
from moe3d.models.dpt import DPTHead as DPTHead
from moe3d.models.mini import MiniVGGT as MiniVGGT

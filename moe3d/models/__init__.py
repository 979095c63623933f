"""Models with VGGT's interface (the embedded MiniVGGT, Depth Anything 3), and one way to load any by its name."""

from moe3d.models.checkpoint import load_mini as load_mini
from moe3d.models.checkpoint import save_mini as save_mini
from moe3d.models.depth_anything import DepthAnything3 as DepthAnything3
from moe3d.models.dpt import DPTHead as DPTHead
from moe3d.models.load import MINI_WIDTH as MINI_WIDTH
from moe3d.models.load import input_width as input_width
from moe3d.models.load import load_model as load_model
from moe3d.models.mini import MiniVGGT as MiniVGGT

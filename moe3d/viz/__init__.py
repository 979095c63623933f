"""Pictures of what the model sees and thinks, and the demo's report page."""

from moe3d.viz.colors import apply_colormap as apply_colormap
from moe3d.viz.colors import colormap as colormap
from moe3d.viz.colors import expert_colors as expert_colors
from moe3d.viz.pictures import depth_picture as depth_picture
from moe3d.viz.pictures import depth_range as depth_range
from moe3d.viz.pictures import entropy_picture as entropy_picture
from moe3d.viz.pictures import error_picture as error_picture
from moe3d.viz.pictures import flying_picture as flying_picture
from moe3d.viz.pictures import gate_picture as gate_picture

"""From images to files: loading, comparing heads, exporting point clouds, and writing results all or nothing."""

from moe3d.atomic import output_folder as output_folder
from moe3d.reconstruct.images import load_images as load_images
from moe3d.reconstruct.images import prepare_image as prepare_image
from moe3d.reconstruct.images import read_image as read_image
from moe3d.reconstruct.point_files import write_glb as write_glb
from moe3d.reconstruct.point_files import write_ply as write_ply

"""Metrics of depth, boundaries and flying points.

A `Frame` puts a prediction on its ground truth's grid; each metric reads a frame; `boundary_report` runs the whole
boundary suite on one image, and the `aggregate_*` functions turn many images' reports into a dataset's.
"""

from moe3d.evaluation.alignment import Alignment as Alignment
from moe3d.evaluation.alignment import fit_alignment as fit_alignment
from moe3d.evaluation.boundary import BoundaryScore as BoundaryScore
from moe3d.evaluation.boundary import EdgeOverlap as EdgeOverlap
from moe3d.evaluation.boundary import depth_boundary_error as depth_boundary_error
from moe3d.evaluation.boundary import edge_chamfer as edge_chamfer
from moe3d.evaluation.boundary import edge_distances as edge_distances
from moe3d.evaluation.boundary import edge_overlap as edge_overlap
from moe3d.evaluation.boundary import errors_near_boundaries as errors_near_boundaries
from moe3d.evaluation.boundary import si_boundary_f1 as si_boundary_f1
from moe3d.evaluation.boundary import si_edge_maps as si_edge_maps
from moe3d.evaluation.boundary import sobel_edge_maps as sobel_edge_maps
from moe3d.evaluation.boundary import sobel_f1 as sobel_f1
from moe3d.evaluation.depth import aggregate_depth as aggregate_depth
from moe3d.evaluation.depth import depth_errors as depth_errors
from moe3d.evaluation.depth import depth_metrics as depth_metrics
from moe3d.evaluation.edge_filter import survives_edge_filter as survives_edge_filter
from moe3d.evaluation.flying import FlyingPoints as FlyingPoints
from moe3d.evaluation.flying import flying_points as flying_points
from moe3d.evaluation.flying import flying_rate_interval as flying_rate_interval
from moe3d.evaluation.flying import flying_sweep as flying_sweep
from moe3d.evaluation.frame import Frame as Frame
from moe3d.evaluation.frame import resize_bilinear as resize_bilinear
from moe3d.evaluation.frame import resize_nearest as resize_nearest
from moe3d.evaluation.predictions import Predictions as Predictions
from moe3d.evaluation.predictions import prediction_path as prediction_path
from moe3d.evaluation.predictions import read_predictions as read_predictions
from moe3d.evaluation.predictions import write_predictions as write_predictions
from moe3d.evaluation.report import aggregate_boundary as aggregate_boundary
from moe3d.evaluation.report import boundary_report as boundary_report

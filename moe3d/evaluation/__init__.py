"""Metrics of depth, boundaries, flying points and point clouds, and datasets evaluated with them.

A `Frame` puts a prediction on its ground truth's grid; each metric of an image reads a frame; `boundary_report` runs
the whole boundary suite on one image, and the `aggregate_*` functions turn many images' reports into a dataset's. A
`Cloud` is judged by `score_cloud`. `evaluate` takes a dataset, systems (prediction files, models) and a `Protocol`, and
returns the report.
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
from moe3d.evaluation.evaluate import FrameView as FrameView
from moe3d.evaluation.evaluate import evaluate as evaluate
from moe3d.evaluation.flying import FlyingPoints as FlyingPoints
from moe3d.evaluation.flying import flying_points as flying_points
from moe3d.evaluation.flying import flying_rate_interval as flying_rate_interval
from moe3d.evaluation.flying import flying_sweep as flying_sweep
from moe3d.evaluation.frame import Frame as Frame
from moe3d.evaluation.frame import resize_bilinear as resize_bilinear
from moe3d.evaluation.frame import resize_nearest as resize_nearest
from moe3d.evaluation.judge import View as View
from moe3d.evaluation.multiview import score_sequence as score_sequence
from moe3d.evaluation.multiview import truth_on_grid as truth_on_grid
from moe3d.evaluation.points import Cloud as Cloud
from moe3d.evaluation.points import estimate_normals as estimate_normals
from moe3d.evaluation.points import fit_similarity as fit_similarity
from moe3d.evaluation.points import icp as icp
from moe3d.evaluation.points import score_cloud as score_cloud
from moe3d.evaluation.predictions import Predictions as Predictions
from moe3d.evaluation.predictions import prediction_path as prediction_path
from moe3d.evaluation.predictions import read_predictions as read_predictions
from moe3d.evaluation.predictions import write_predictions as write_predictions
from moe3d.evaluation.protocol import Protocol as Protocol
from moe3d.evaluation.report import aggregate_boundary as aggregate_boundary
from moe3d.evaluation.report import boundary_report as boundary_report
from moe3d.evaluation.sampling import default_sampling as default_sampling
from moe3d.evaluation.sampling import sample_frames as sample_frames
from moe3d.evaluation.systems import FileSystem as FileSystem
from moe3d.evaluation.systems import ModelSystem as ModelSystem

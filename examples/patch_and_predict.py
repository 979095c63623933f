"""Give a VGGT-like model a mixture-of-experts depth head, and look at what it adds."""

import torch

import moe3d
from moe3d.data import open_dataset

model = moe3d.load_mini()  # or VGGT.from_pretrained("facebook/VGGT-1B").eval()
moe3d.patch_vggt(model, num_experts=4, return_experts=True)  # in place; predicts what it did, up to the noise

sample = open_dataset("synthetic").load("scene-000000", ["frame-0000", "frame-0001"])
with torch.no_grad():
    predictions = model(sample.images)

for key in ("depth", "depth_conf", "depth_entropy", "depth_weights", "depth_hypotheses"):
    print(f"{key:17s}", list(predictions[key].shape))

moe3d.unpatch_vggt(model)  # the stock head again, bit for bit

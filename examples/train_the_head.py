"""Train nothing but the mixture-of-experts head, in a loop of your own.

`moe3d train` does this with schedules, validation and checkpoints; this is the least that works.
"""

import argparse

import torch

import moe3d
from moe3d.data import open_dataset
from moe3d.losses import entropy_loss, moe_depth_loss

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
steps = parser.parse_args().steps

model = moe3d.load_mini()
moe3d.patch_vggt(model, num_experts=4, init_noise=0.3)
model.requires_grad_(False)
tail = model.depth_head.tail.requires_grad_(True).train()  # the experts and the gate
optimizer = torch.optim.AdamW(tail.parameters(), lr=1e-3)

dataset = open_dataset("synthetic", split="train")
sequences = list(dataset.sequences)
for step in range(steps):
    sequence = sequences[step % len(sequences)]
    sample = dataset.load(sequence, dataset.sequences[sequence][:2])
    predictions = model(sample.images)
    depths = predictions["depth"][0, ..., 0], sample.depth  # each in a unit of its own
    depth, truth = (depth / depth[sample.valid].median().detach() for depth in depths)
    loss = moe_depth_loss(depth, truth, sample.valid)
    loss = loss + 0.01 * entropy_loss(predictions["depth_entropy"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step:3d}  loss {loss.item():.4f}  entropy {predictions['depth_entropy'].mean().item():.4f} nats")

moe3d.save_head(model, "head.safetensors")  # some 300 kB, without the backbone

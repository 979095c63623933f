"""The operation alone, in a network of your own: features at one resolution in, depth at another out."""

import torch
from torch import nn

import moe3d


class Network(nn.Module):
    """A decoder whose output block is a mixture of four experts."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 64, kernel_size=8, stride=8)
        self.head = moe3d.MoEHead(in_channels=64, out_channels=2, num_experts=4, gate_hidden=64)

    def forward(self, images):
        return self.head(self.backbone(images), size=images.shape[-2:])


network = Network()
output = network(torch.rand(2, 3, 128, 160))
print("depth     ", list(output.prediction.shape))
print("confidence", list(output.confidence.shape))
print("entropy   ", list(output.entropy.shape), "nats, at most log 4 = 1.386")
output.prediction.mean().backward()
print("backends  ", {name: reason or "can run" for name, reason in moe3d.backends().items()})

"""What a backend is."""

from __future__ import annotations

import abc

from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput


class Backend(abc.ABC):
    """One implementation of the operation, forward and backward, on tensors that are already validated."""

    @property
    def automatic(self) -> bool:
        """Whether "auto" may choose it."""
        return True

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, in words that follow "because"; None if it can."""

    def unsupported(self, tensors: HeadTensors, options: HeadOptions) -> str | None:
        """Why it cannot run this call, in the same form; None if it can."""
        return None

    @abc.abstractmethod
    def forward(self, tensors: HeadTensors, options: HeadOptions) -> MoEOutput:
        """The outputs, contiguous, in float32 for 16-bit inputs."""

    @abc.abstractmethod
    def backward(
        self, tensors: HeadTensors, options: HeadOptions, cotangents: MoEOutput, needs: HeadTensors
    ) -> HeadTensors:
        """The gradients; None where ``needs`` is False. A cotangent is None where its output was not used."""

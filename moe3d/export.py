"""Models as files for deployment: ONNX, and AOTInductor packages.

Both hold ONNX's or PyTorch's own operators in place of this package's, so that they run where it is not installed; they
compute what the reference backend does.

For example, a head whose number of images stays open:

>>> import moe3d, moe3d.export, onnxruntime, torch
>>> head = moe3d.MoEHead(in_channels=8, num_experts=2).eval()
>>> images = {0: torch.export.Dim("images", min=1, max=64)}
>>> moe3d.export.to_onnx(head, (torch.randn(2, 8, 7, 9), (28, 36)), "head.onnx", dynamic_shapes=(images, (None, None)))
>>> session = onnxruntime.InferenceSession("head.onnx")
>>> outputs = session.run(["prediction", "entropy"], {"x": torch.randn(5, 8, 7, 9).numpy()})
>>> [output.shape for output in outputs]
[(5, 1, 28, 36), (5, 28, 36)]

A patched MiniVGGT takes ``(images,)`` [B, S, 3, H, W]; with ``dynamic_shapes=({1: torch.export.Dim("frames", min=1,
max=64)},)`` the number of frames stays open (``min=2`` with PyTorch 2.9 and older). Batch, height and width are the
example's: the position embedding is computed for them. VGGT's and Depth Anything 3's own backbones ask their data for a
size (the rotary embedding's table), which ``torch.export`` refuses; their patched heads export.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe3d.atomic import output_folder, whole_file
from moe3d.ops.schema import decompose_moe_head, moe_head_op
from moe3d.ops.types import MoEOutput

_BFLOAT16_OPSET = 22  # of ONNX's Conv


def to_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """``torch.export`` of a model in eval mode, with this package's operators written out in PyTorch's own.

    Args:
        model: a patched model, a patched head, a :class:`~moe3d.nn.MoEHead`, or any module that holds one.
        args, kwargs: an example of what it is called with; at least 2 long in each dimension that is to stay open.
        dynamic_shapes: the dimensions that stay open, as for ``torch.export.export``; None = all are the example's.

    All frames go through the head at once, whatever ``frames_chunk_size`` is: a loop would fix their number. Where the
    model returns a :class:`~moe3d.ops.types.MoEOutput`, the program returns a dictionary with the names of its fields.

    Raises:
        ValueError: the model is in training mode.
    """
    from torch.fx.experimental import _config as tracing

    if model.training:
        raise ValueError(f"model must be in eval mode, got {type(model).__name__} in training mode: call model.eval()")
    # Without "oblivious", ``expand(frames - 1)``, as VGGT's camera tokens have it, would rule out two frames.
    oblivious = tracing.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), _plain_outputs(model), oblivious:
        program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        return program.run_decompositions({moe_head_op._opoverload: decompose_moe_head})


def to_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int | None = None,
) -> None:
    """Write a model as ONNX; needs the ``export`` extra (``pip install moe3d[export]``).

    Inputs are named as the arguments of the model's forward, outputs as the keys or fields of what it returns
    ("pose_enc_list.0" in a list, "output.0" in a tuple, "images.out" where an input has that name). Weights beyond
    2 GB go into ``<path>.data`` beside it.

    Args:
        model, args, kwargs, dynamic_shapes: as for :func:`to_program`.
        path: the file to write, whole or not at all.
        opset: ONNX's version of operators; None = PyTorch's default (18 or later).

    Raises:
        ValueError: the model is in training mode, or computes in bfloat16, which convolutions have from opset 22 on.
        OSError: the file cannot be written.
    """
    program = to_program(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    if _computes_in_bfloat16(program) and (opset or 0) < _BFLOAT16_OPSET:
        raise ValueError(
            f"opset must be at least {_BFLOAT16_OPSET} for a model that computes in bfloat16, got {opset}; float16 is "
            "what ONNX Runtime's CPU provider runs"
        )
    inputs, outputs = _names(program)
    onnx = torch.onnx.export(
        program, (), dynamo=True, verbose=False, opset_version=opset, input_names=inputs, output_names=outputs
    )
    assert onnx is not None  # it is None only for the old exporter
    path = Path(path)
    with output_folder(path.parent) as folder:
        onnx.save(folder / path.name)


def to_aoti(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Compile a model ahead of time, for the device that it is on, into an AOTInductor package (``.pt2``).

    ``torch._inductor.aoti_load_package(path)`` gives a function with the model's arguments and outputs; C++ programs
    load it without Python. Needs a C++ compiler, and minutes. Sizes and types other than the example's are not noticed
    when it runs, and give garbage: with AOTI_RUNTIME_CHECK_INPUTS=1 in the environment they are refused.

    Args:
        model, args, kwargs, dynamic_shapes: as for :func:`to_program`.
        path: the file to write, whole or not at all; ends in ".pt2".

    Raises:
        ValueError: the model is in training mode, or ``path`` has another ending.
        OSError: the file cannot be written.
    """
    from torch._inductor import aoti_compile_and_package

    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {str(path)!r}")
    program = to_program(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    with whole_file(path) as unfinished:
        package = unfinished.with_suffix(".pt2")  # the only ending that PyTorch writes
        try:
            aoti_compile_and_package(program, package_path=str(package))
            package.rename(unfinished)
        finally:
            package.unlink(missing_ok=True)


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """Dictionaries, of which ``torch.export`` knows no subclass, as Depth Anything 3 returns it; and in place of a
    :class:`MoEOutput`, which nobody knows where this package is not installed."""

    def plain(module, args, outputs):
        if isinstance(outputs, MoEOutput):
            return outputs._asdict()
        return dict(outputs) if isinstance(outputs, dict) else outputs

    handle = model.register_forward_hook(plain)
    try:
        yield
    finally:
        handle.remove()


def _computes_in_bfloat16(program: torch.export.ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)


def _names(program: torch.export.ExportedProgram) -> tuple[list[str], list[str]]:
    """Of the inputs and outputs that are tensors; an output's name says where it stands in what the model returns."""
    from torch.export.graph_signature import InputKind, TensorArgument
    from torch.utils import _pytree

    signature, spec = program.graph_signature, program.call_spec.out_spec
    # By their kind: of an argument that is no tensor, ``signature.user_inputs`` has the value, which may be a string.
    given = [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    inputs = [argument.name for argument in given if isinstance(argument, TensorArgument)]
    positions = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(positions)[0]]
    outputs = [_name(path) for path, out in zip(paths, signature.user_outputs, strict=True) if out]
    return inputs, [f"{name}.out" if name in inputs else name for name in outputs]


def _name(path: str) -> str:
    """``['depth']`` to "depth", ``.entropy`` to "entropy", ``[0]`` to "output.0"."""
    parts = re.findall(r"\w+", path)
    return ".".join(parts if parts and not parts[0].isdigit() else ["output", *parts])

"""The counts against counts by hand, by PyTorch's own counter, and against the published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe3d.benchmark.case import Case, random_inputs, random_weights
from moe3d.benchmark.peers import concatenated, features, single_head
from moe3d.benchmark.roofline import (
    VGGT_HEAD_PARAMETERS,
    Ceilings,
    Work,
    counted_overhead,
    eager_bytes,
    eager_bytes_by_expert,
    embedding_bytes,
    measure_ceilings,
    tail_work,
    vggt_head_macs,
    vggt_macs,
    vggt_paper_flops,
)
from moe3d.models.dpt import DPTHead

SMALL = Case(frames=3, height=28, width=42, experts=3, gate_hidden=10, channels=8, expert_hidden=6, outputs=2)


def counted_macs(run) -> int:
    """By PyTorch, which knows convolutions but not interpolation."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("experts", [1, 3])
def test_direct_macs_are_those_of_the_convolutions(experts):
    case = replace(SMALL, experts=experts)
    x, weights = random_inputs(case, 0)[0], random_weights(case, 0)
    tail = (concatenated if experts > 1 else single_head)(features(case, cached=True), weights)
    assert tail_work(case).matrix_macs == counted_macs(lambda: tail(x))


def test_low_resolution_macs_are_those_of_its_product():
    case, (h, w) = SMALL, SMALL.source_size
    x = torch.randn(case.frames, h * w, case.channels)
    first = counted_macs(lambda: x @ torch.randn(case.channels, 9 * case.hidden))
    second = case.pixels * case.frames * (3 * 6 * 2 + 10 * 3)
    assert tail_work(case, "low-resolution").matrix_macs == first + second


def test_counts_of_one_vggt_frame_by_hand():
    case = Case()
    second = 268_324 * (4 * 32 * 2 + 128 * 4)
    assert case.hidden == 256 and case.source_size == (296, 296) and case.pixels == 268_324
    assert tail_work(case.single).matrix_macs == 268_324 * (1_152 * 32 + 32 * 2)
    assert tail_work(case).matrix_macs == 268_324 * 1_152 * 256 + second
    assert tail_work(case, "columns").matrix_macs == 518 * 296 * 384 * 768 + second
    assert tail_work(case, "winograd").matrix_macs == 87 * 87 * 64 * 128 * 256 + second
    assert tail_work(case, "low-resolution").matrix_macs == 87_616 * 128 * 9 * 256 + second
    assert tail_work(case).vector_macs == 268_324 * 128 * 4
    # 3 kernel rows x 3 kernel columns x 2 taps along the row, then 3 kernel rows x 2 taps down the column
    assert tail_work(case, "low-resolution").vector_macs == 296 * 518 * 256 * 18 + 518 * 518 * 256 * 6


def test_bytes_of_one_vggt_frame_by_hand():
    case = Case()
    parameters = 4 * 36_962 + (1_152 + 1) * 128 + (128 + 1) * 4
    assert case.parameters == parameters
    least = 4 * (87_616 * 128 + parameters + (518 + 518) * 64 + 268_324 * 3)
    assert tail_work(case).bytes == least
    # upsample 128, add 3 x 128, convolve 128 + 256, ReLU 2 x 256, second layer 256 + 12, mixture 12 + 3
    by_hand = 4 * (87_616 * 128 + 268_324 * (128 + 384 + 384 + 512 + 268 + 15) + parameters)
    assert eager_bytes(case) == by_hand
    assert eager_bytes_by_expert(case) - by_hand == 4 * 4 * 268_324 * 128
    assert embedding_bytes(case) == 268_324 * 128 * 64


def test_16_bit_inputs_and_many_frames_scale_what_they_should():
    one, eight = tail_work(Case()), tail_work(Case(frames=8))
    assert eight.matrix_macs == 8 * one.matrix_macs and eight.vector_macs == 8 * one.vector_macs
    fixed = one.bytes - 4 * (87_616 * 128 + 268_324 * 3)
    assert eight.bytes - fixed == 8 * (one.bytes - fixed)
    outputs = 4 * 268_324 * 3
    assert 2 * (tail_work(Case(precision="bf16")).bytes - outputs) == one.bytes - outputs


def test_the_widened_head_has_the_mixtures_parameters():
    case = Case()
    assert case.widened.parameters == pytest.approx(case.parameters, rel=0.5 * 1_155 / case.parameters)
    assert case.widened.experts == 1


@pytest.mark.parametrize("size", [(518, 518), (154, 518)])
def test_head_macs_are_those_of_the_dpt_head(size):
    with torch.device("meta"):
        head = DPTHead(2048, output_dim=2, activation="exp")
        patches = (size[0] // 14) * (size[1] // 14)
        tokens = {layer: torch.empty(1, 1, 5 + patches, 2048) for layer in head.intermediate_layer_idx}
        images = torch.empty(1, 1, 3, *size)
        assert vggt_head_macs(*size) == counted_macs(lambda: head(tokens, images, 5))
    assert sum(p.numel() for p in head.parameters()) == VGGT_HEAD_PARAMETERS


def test_vggt_as_fvcore_counts_it():
    """fvcore 0.1.5 on the real VGGT (commit 44b3afb), one frame: by operator, in G."""
    linear, conv, layer_norm, upsample = 1244.802318336, 150.085236992, 1.75148032, 0.256539648
    assert vggt_macs(518, 518) / 1e9 == pytest.approx(linear + conv, abs=1e-9)
    assert vggt_paper_flops(518, 518) / 1e9 == pytest.approx(linear + conv + layer_norm + upsample, abs=1e-9)


@pytest.mark.parametrize("experts, gate", [(4, 128), (6, 64), (7, 32)])
def test_the_papers_budget_gives_the_papers_percentages(experts, gate):
    overhead = counted_overhead(Case(experts=experts, gate_hidden=gate))
    assert round(overhead.gflops, 2) == 4.97 or experts != 4  # the others fit to within a hundredth
    assert overhead.gflops == pytest.approx(4.97, abs=0.015)
    assert overhead.parameters == pytest.approx(0.79, abs=0.005)


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    ceilings = Ceilings(copy_bytes_per_s=10.0, matrix_flops_per_s={"ieee": 4.0})
    assert ceilings.floor_s(Work(6, 0, 20), "ieee") == (3.0, "arithmetic")
    assert ceilings.floor_s(Work(6, 0, 40), "ieee") == (4.0, "memory")


def test_unknown_formulation():
    with pytest.raises(ValueError, match="low-resolution, winograd, got 'fft'"):
        tail_work(SMALL, "fft")


def test_measured_ceilings_are_of_this_world(small_ceilings):
    ceilings = measure_ceilings("cpu", ("ieee",))
    assert 1e8 < ceilings.copy_bytes_per_s < 1e13
    assert 1e8 < ceilings.matrix_flops_per_s["ieee"] < 1e14


def test_the_printed_model_holds_every_case():
    from bench import roofline

    text = roofline.table(Ceilings(1e10, {"ieee": 1e12}))
    assert "518x518 K=4     low-resolution          26.05" in text and "floor ms" in text
    assert "4.97% GFLOPs and 0.79% parameters" in roofline.whole()

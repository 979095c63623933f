"""The truth that judges every backend is itself held against loops over pixels that follow op.md's text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from support import truth
from support.problems import Problem, random_problem


def scalar_activation(name, y):
    """VGGT's activations of one pixel's channels, as numbers."""
    inv_log = [math.copysign(math.expm1(abs(v)), v) for v in y]
    length = math.sqrt(sum(v * v for v in y))
    return {
        "linear": lambda: y,
        "exp": lambda: [math.exp(v) for v in y],
        "relu": lambda: [max(v, 0.0) for v in y],
        "sigmoid": lambda: [1 / (1 + math.exp(-v)) for v in y],
        "inv_log": lambda: inv_log,
        "norm": lambda: [v / length for v in y],
        "norm_exp": lambda: [v / length * math.expm1(length) for v in y],
        "xy_inv_log": lambda: [y[0] * inv_log[2], y[1] * inv_log[2], inv_log[2]],
    }[name]()


def scalar_confidence(name, y):
    return {"expp1": 1 + math.exp(y), "expp0": math.exp(y), "sigmoid": 1 / (1 + math.exp(-y))}[name]


def upsampled(image, size, row, column):
    """Bilinear with align_corners=True: corner pixels meet corner pixels."""

    def taps(target_index, source, target):
        position = target_index * (source - 1) / (target - 1) if target > 1 else 0.0
        low = min(math.floor(position), source - 1)
        high = min(low + 1, source - 1)
        return (low, 1 - (position - low)), (high, position - low)

    (h, w), (height, width) = image.shape, size
    return sum(wy * wx * image[y, x] for y, wy in taps(row, h, height) for x, wx in taps(column, w, width))


def features_by_loops(problem: Problem, b: int):
    x = problem.tensors["x"].numpy()
    channels, (height, width) = x.shape[1], problem.size
    features = np.zeros((channels, height, width))
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                features[c, row, column] = upsampled(x[b, c], problem.size, row, column)
                if problem.pos is not None:
                    half = channels // 2
                    table = problem.pos[0][column, c] if c < half else problem.pos[1][row, c - half]
                    features[c, row, column] += table.item()
    return features


def perceptron(features, row, column, w1, b1, w2, b2):
    """A 3x3 convolution with zero padding, ReLU, and a 1x1 layer, at one pixel."""
    channels, height, width = features.shape
    hidden = []
    for unit in range(len(b1)):
        total = b1[unit]
        for c in range(channels):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        total += w1[unit, c, dy + 1, dx + 1] * features[c, row + dy, column + dx]
        hidden.append(max(total, 0.0))
    return [b2[o] + sum(w2[o, unit] * hidden[unit] for unit in range(len(hidden))) for o in range(len(b2))]


def pixel_by_loops(problem: Problem, features, b, row, column):
    """prediction, confidence, entropy, weights and hypotheses at one pixel."""
    t = {name: value.numpy() for name, value in problem.tensors.items()}
    experts, channels = problem.experts, problem.prediction_channels
    z = [
        perceptron(features, row, column, *(t[f"expert_{part}"][k] for part in ("w1", "b1", "w2", "b2")))
        for k in range(experts)
    ]
    logits = perceptron(features, row, column, *(t[f"gate_{part}"] for part in ("w1", "b1", "w2", "b2")))
    if "gate_logits" in t:
        logits = [g + t["gate_logits"][b, k, row, column] for k, g in enumerate(logits)]
    exponentials = [math.exp(g / problem.option("temperature")) for g in logits]
    weights = [e / sum(exponentials) for e in exponentials]
    hypotheses = [scalar_activation(problem.option("activation"), z[k][:channels]) for k in range(experts)]

    best = logits.index(max(logits))
    choose = problem.option("mode") == "argmax"
    if problem.option("mode") == "switch":
        heard = [hypotheses[k] for k in range(experts) if weights[k] > 0.01]
        bar = math.exp(problem.option("gap"))
        choose = any(max(d[c] for d in heard) > bar * min(d[c] for d in heard) for c in range(channels))
    decode = [float(k == best) for k in range(experts)] if choose else weights
    confidence = None
    if problem.option("conf_activation") is not None:
        confidences = [scalar_confidence(problem.option("conf_activation"), z[k][channels]) for k in range(experts)]
        confidence = sum(w * c for w, c in zip(decode, confidences, strict=True))
    prediction = [sum(decode[k] * hypotheses[k][c] for k in range(experts)) for c in range(channels)]
    return prediction, confidence, -sum(w * math.log(w) for w in weights), weights, hypotheses


CASES = [
    *({"activation": a, "prediction_channels": 3} for a in truth.PREDICTION),
    *({"conf_activation": c} for c in (*truth.CONFIDENCE, None)),
    {"activation": "relu", "mode": "switch", "prediction_channels": 3},
    {"mode": "argmax", "temperature": 0.3},
    {"mode": "switch", "gap": 0.6, "experts": 4},
    {"source": (1, 3), "size": (3, 5)},
    {"source": (3, 1), "size": (2, 4)},
    {"source": (4, 5), "size": (2, 3)},
    {"source": (2, 2), "size": (1, 4)},
    {"source": (3, 4), "size": (3, 4)},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_truth_is_the_definition(case):
    arguments = {"source": (2, 3), "size": (3, 4)} | case
    problem = random_problem(
        batch=2, channels=4, hidden=3, gate_hidden=2, pos=True, gate_logits=True, dtype=torch.float64, **arguments
    )
    outputs = truth.evaluate(problem)
    for b in range(2):
        features = features_by_loops(problem, b)
        for row in range(problem.size[0]):
            for column in range(problem.size[1]):
                expected = pixel_by_loops(problem, features, b, row, column)
                for output, value in zip(outputs, expected, strict=True):
                    assert (output is None) == (value is None)
                    if value is not None:
                        np.testing.assert_allclose(output[b, ..., row, column].numpy(), value, rtol=1e-11, atol=1e-11)

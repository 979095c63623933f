"""The per-pixel half of the operation on a tile: gate softmax, decode modes, entropy; and its derivative.

``z`` [M, OP, KP] holds, for M pixels and up to KP experts, the raw outputs in rows 0..P-1 (prediction), P (confidence,
where there is one) and O (the gate's logits). Weights are [M, KP]. OP and KP are powers of two, padded.
"""

import triton
import triton.language as tl

from moe3d.kernels.activations import activation, activation_vjp, confidence, confidence_vjp

SWITCH_MIN_WEIGHT = tl.constexpr(0.01)  # experts at or below it have no say in whether the hypotheses disagree


@triton.jit
def softmax(logits, expert, temperature, EXPERTS: tl.constexpr):
    """Weights and their logarithms, [M, KP]; the shift comes first, so that a small temperature cannot overflow.

    Equal logits give exactly 1/K: hence div_rn, since `/` is up to 2 ulp off on a GPU.
    """
    logits = tl.where(expert < EXPERTS, logits, -float("inf"))
    shifted = (logits - tl.max(logits, axis=1, keep_dims=True)) / temperature
    total = tl.sum(tl.exp(shifted), axis=1, keep_dims=True)
    return tl.div_rn(tl.exp(shifted), total), shifted - tl.log(total)


@triton.jit
def times_log(weights, log_weights):
    """w log w with 0 log 0 = 0; NaN stays NaN."""
    return tl.where(weights == 0, 0.0, weights * log_weights)


@triton.jit
def entropy_of(weights, log_weights, log_experts):
    """[M], in nats, kept within 0 and log K."""
    entropy = -tl.sum(times_log(weights, log_weights), axis=1)
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return tl.where(entropy > log_experts, log_experts, entropy)


@triton.jit
def experts_in_reach(logits, weights, expert, inside, skip_below, EXPERTS: tl.constexpr):
    """[KP] counts: above 0 for the experts whose weight reaches skip_below somewhere in the tile, or for all of them
    where a logit of the tile is not finite."""
    strange = (tl.abs(logits) < float("inf")) == 0
    reached = (weights >= skip_below) | (tl.sum(strange.to(tl.int32), axis=1, keep_dims=True) > 0)
    strange_tile = tl.max(tl.where(inside, (strange & (expert < EXPERTS)).to(tl.int32), 0))
    return tl.max((reached & inside).to(tl.int32), axis=0) + strange_tile


@triton.jit
def values_of(z, row, expert, EXPERTS: tl.constexpr, PREDICTED: tl.constexpr, ACT: tl.constexpr, CONF: tl.constexpr):
    """Hypotheses and confidences in their rows of [M, OP, KP], 0 elsewhere."""
    predicted = row < PREDICTED
    values = tl.where(predicted, activation(z, row, predicted, ACT), 0.0)
    if CONF != "none":
        values = tl.where(row == PREDICTED, confidence(z, CONF), values)
    return tl.where(expert[None, :, :] < EXPERTS, values, 0.0)


@triton.jit
def one_hot(logits, weights, expert, EXPERTS: tl.constexpr):
    """1 at the most probable expert (the first of equals), 0 elsewhere; a NaN gate must not look like a choice."""
    logits = tl.where(expert < EXPERTS, logits, -float("inf"))
    best = tl.max(logits, axis=1, keep_dims=True)
    first = tl.min(tl.where((logits == best) & (expert < EXPERTS), expert, EXPERTS), axis=1, keep_dims=True)
    return tl.where(weights != weights, weights, tl.where(expert == first, 1.0, 0.0))


@triton.jit
def disagreement(values, weights, row, ratio, PREDICTED: tl.constexpr):
    """[M, 1]: whether in any channel the hypotheses with a say differ by more than the ratio; never beside NaN."""
    heard = (weights > SWITCH_MIN_WEIGHT)[:, None, :] & (row < PREDICTED)
    largest = tl.max(tl.where(heard, values, -float("inf")), axis=2)
    smallest = tl.min(tl.where(heard, values, float("inf")), axis=2)
    nan = tl.max((heard & (values != values)).to(tl.int32), axis=2)
    differs = (largest > ratio * smallest) & (nan == 0)
    return tl.max(differs.to(tl.int32), axis=1, keep_dims=True) > 0


@triton.jit
def decode_weights(logits, weights, values, row, expert, ratio, EXPERTS: tl.constexpr, PREDICTED: tl.constexpr,
                   MODE: tl.constexpr):  # fmt: skip
    """The weights of the decoded value, [M, KP], and where they are a choice of one expert, [M, 1]."""
    chosen = tl.zeros([weights.shape[0], 1], tl.int1)
    decode = weights
    if MODE == "argmax":
        chosen = tl.full([weights.shape[0], 1], 1, tl.int1)
    elif MODE == "switch":
        chosen = disagreement(values, weights, row, ratio, PREDICTED)
    if MODE != "mean":
        decode = tl.where(chosen, one_hot(logits, weights, expert, EXPERTS), weights)
    return decode, chosen


@triton.jit
def decoded(values, decode, chosen):
    """sum_k w_k v_k, [M, OP]; what was not chosen may overflow unnoticed."""
    decode = decode[:, None, :]
    unheard = chosen[:, :, None] & (decode == 0)
    return tl.sum(tl.where(unheard, 0.0, decode * values), axis=2)


@triton.jit
def mixture_vjp(z, logits, row, expert, grad_output, grad_weights, grad_hypotheses, grad_entropy, temperature,
                log_experts, ratio, EXPERTS: tl.constexpr, PREDICTED: tl.constexpr, OUTPUTS: tl.constexpr,
                ACT: tl.constexpr, CONF: tl.constexpr, MODE: tl.constexpr, HAS_GATE: tl.constexpr):  # fmt: skip
    """The gradient to every row of ``z``, [M, OP, KP]: outputs in rows 0..O-1, the gate's logits in row O."""
    predicted = row < PREDICTED
    values = values_of(z, row, expert, EXPERTS, PREDICTED, ACT, CONF)
    weights, log_weights = softmax(logits, expert, temperature, EXPERTS)
    decode, chosen = decode_weights(logits, weights, values, row, expert, ratio, EXPERTS, PREDICTED, MODE)
    grad_values = decode[:, None, :] * grad_output[:, :, None] + grad_hypotheses
    grad = tl.where(predicted, activation_vjp(z, tl.where(predicted, grad_values, 0.0), row, predicted, ACT), 0.0)
    if CONF != "none":
        grad = tl.where(row == PREDICTED, confidence_vjp(z, grad_values, CONF), grad)
    if MODE != "mean":  # what was not chosen may overflow unnoticed
        grad = tl.where(chosen[:, :, None] & (decode[:, None, :] == 0) & (grad_values == 0), 0.0, grad)
    if HAS_GATE:
        grad_decode = tl.sum(values * grad_output[:, :, None], axis=1)
        # the choice has no slope: there the gate learns from entropy and weights alone
        grad_decode = tl.where(chosen, 0.0, grad_decode) + grad_weights
        inner = tl.sum(weights * grad_decode, axis=1, keep_dims=True)
        entropy = entropy_of(weights, log_weights, log_experts)[:, None]
        slope = times_log(weights, log_weights) + weights * entropy  # -dH/ds_k, finite where w_k underflows
        grad_logits = (weights * (grad_decode - inner) - slope * grad_entropy) / temperature
        grad = tl.where(row == OUTPUTS, grad_logits[:, None, :], grad)
    return tl.where(expert[None, :, :] < EXPERTS, grad, 0.0)

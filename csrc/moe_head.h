// The contract between the Python side and the kernels: plain data, no tensor class, no exception crosses it.
//
// Shapes and meanings are those of moe3d.functional.moe_head. Every float pointer is contiguous float32; `x` alone keeps
// its own element type and strides, and so does its gradient. A pointer that may be absent is null.
#pragma once

#include <cstdint>

namespace moe {

enum class Status : int32_t {
  ok = 0,
  out_of_memory = 1,
  unknown_isa = 2,
  isa_not_supported = 3,
  workspace_too_small = 4,
  cuda_error = 1000,  // and above: 1000 + cudaError_t
};

enum class Element : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// In the order of moe3d.ops.activations.ACTIVATIONS and CONF_ACTIVATIONS, and of moe3d.ops.mixture.MODES.
enum class Activation : int32_t { exp = 0, relu, sigmoid, linear, inv_log, xy_inv_log, norm, norm_exp };
enum class ConfActivation : int32_t { none = -1, expp1 = 0, expp0, sigmoid };
// How the forward pass makes hidden activations: see cpu/hidden.h, cpu/tiles.h, cuda/low_resolution.h and
// cuda/convolution.h. Automatic: by counting operations. bf16x3: at low resolution, each float32 number of a product as
// the sum of two bfloat16 ones.
enum class Formulation : int32_t { automatic = 0, low_resolution, winograd /* CPU */, direct /* CUDA */, bf16x3 /* CPU */ };
enum class Mode : int32_t { mean = 0, argmax, switch_ };

struct Problem {
  // sizes
  int64_t batch, channels, in_height, in_width, height, width;
  int64_t experts, expert_hidden, outputs;
  int64_t gate_hidden;  // 0: there is no gate
  // inputs
  const void* x;
  Element x_element;
  int64_t x_strides[4];  // of batch, channel, row, column; in elements
  const float *expert_w1, *expert_b1, *expert_w2, *expert_b2;
  const float *gate_w1, *gate_b1, *gate_w2, *gate_b2;
  const float* gate_logits;
  const float *pos_x, *pos_y;
  const float* packed;  // forward only: what cpu::pack wrote for an equal description; null: pack anew
  // options
  float temperature;
  Activation activation;
  ConfActivation conf_activation;
  Mode mode;
  float gap;
  float skip_below;
  bool bf16;      // multiply in bfloat16, accumulate in float32
  Formulation formulation;  // of the forward pass; where it cannot run, another one does
  const char* isa;  // "auto", or one of those that moe::cpu::isa_names() lists
  int32_t threads;

  bool has_gate() const { return gate_hidden > 0; }
  bool has_confidence() const { return conf_activation != ConfActivation::none; }
  int64_t prediction_channels() const { return outputs - (has_confidence() ? 1 : 0); }
  int64_t pixels() const { return height * width; }
};

// Outputs of the forward pass, and in the same layout their cotangents in the backward pass (null: not used).
template <typename Float>
struct HeadMaps {
  Float *prediction, *confidence, *entropy, *weights, *hypotheses;
};
using Outputs = HeadMaps<float>;
using Cotangents = HeadMaps<const float>;

// Gradients, written whole (never added to); null: not wanted. All float32 and contiguous.
struct Gradients {
  float* x;  // [B, h, w, C]: channels last
  float *expert_w1, *expert_b1, *expert_w2, *expert_b2;
  float *gate_w1, *gate_b1, *gate_w2, *gate_b2;
  float* gate_logits;
};

namespace cpu {
Status forward(const Problem& problem, const Outputs& outputs);
Status backward(const Problem& problem, const Cotangents& cotangents, const Gradients& gradients);

// What forward() takes: not automatic. Looks at sizes, `bf16`, `formulation` and `isa` alone.
Formulation formulation(const Problem& problem);
// The first layers' weights as forward() reads them, which depend on that, and on `isa`.
Status packed_floats(const Problem& problem, int64_t& out);
Status pack(const Problem& problem, float* out);  // aligned to 64 bytes
}  // namespace cpu

// On a GPU every pointer is one of its addresses; `isa`, `threads` and `bf16` mean nothing. Work is enqueued on the
// stream, nothing is allocated and nobody waits, so calls can be captured in a CUDA graph.
namespace cuda {

// Of the products of the 3x3 convolutions; sums are float32.
enum class Arithmetic : int32_t { ieee = 0, tf32, bf16, fp16 };

struct Execution {
  Arithmetic arithmetic;
  int32_t device;         // where all the memory is
  void* stream;           // cudaStream_t
  void* workspace;        // aligned to 256 bytes; as many bytes as the functions below ask for
  int64_t workspace_bytes;
};

// What forward() takes on a GPU with the most shared memory: not automatic.
Formulation formulation(const Problem& problem, Arithmetic arithmetic);
int64_t forward_workspace(const Problem& problem, Arithmetic arithmetic);
Status forward(const Problem& problem, const Outputs& outputs, const Execution& execution);

int64_t backward_workspace(const Problem& problem, Arithmetic arithmetic);
Status backward(const Problem& problem, const Cotangents& cotangents, const Gradients& gradients,
                const Execution& execution);

const char* message(Status status);  // what a status other than ok says
}  // namespace cuda

}  // namespace moe

#include "kernels.h"
namespace moe::cpu { Status backward(const Problem&, const Cotangents&, const Gradients&) { return Status::ok; } }

// The Python module moe3d._native: sizes, options and raw addresses in, a status out. It knows neither PyTorch nor
// NumPy, so one build serves every version of them; moe3d/ops/native*.py fill in the fields by name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/select.h"
#include "decoder.h"
#include "moe_head.h"
#include "sharpen.h"

namespace py = pybind11;
using moe::Problem;

namespace {

// The structs own nothing; their `isa` alone needs memory behind it.
template <typename Struct>
struct Owned : Struct {
  Owned() : Struct{} { set_isa("auto"); }
  void set_isa(const std::string& name) {
    isa_name = name;
    this->isa = isa_name.c_str();
  }
  std::string isa_name;
};
using OwnedProblem = Owned<Problem>;

template <typename Class, typename Struct, typename Pointer>
void def_address(Class& cls, const char* name, Pointer Struct::*field) {
  using Owner = typename Class::type;
  cls.def_property(
      name, [field](const Owner& self) { return reinterpret_cast<uintptr_t>(self.*field); },
      [field](Owner& self, uintptr_t address) { self.*field = reinterpret_cast<Pointer>(address); });
}

template <typename Class, typename Enum>
void def_code(Class& cls, const char* name, Enum Problem::*field) {
  cls.def_property(
      name, [field](const OwnedProblem& self) { return static_cast<int>(self.*field); },
      [field](OwnedProblem& self, int code) { self.*field = static_cast<Enum>(code); });
}

void bind_problem(py::module_& m) {
  py::class_<OwnedProblem> cls(m, "Problem");
  cls.def(py::init<>());
  cls.def_readwrite("batch", &OwnedProblem::batch);
  cls.def_readwrite("channels", &OwnedProblem::channels);
  cls.def_readwrite("in_height", &OwnedProblem::in_height);
  cls.def_readwrite("in_width", &OwnedProblem::in_width);
  cls.def_readwrite("height", &OwnedProblem::height);
  cls.def_readwrite("width", &OwnedProblem::width);
  cls.def_readwrite("experts", &OwnedProblem::experts);
  cls.def_readwrite("expert_hidden", &OwnedProblem::expert_hidden);
  cls.def_readwrite("outputs", &OwnedProblem::outputs);
  cls.def_readwrite("gate_hidden", &OwnedProblem::gate_hidden);
  cls.def_readwrite("temperature", &OwnedProblem::temperature);
  cls.def_readwrite("gap", &OwnedProblem::gap);
  cls.def_readwrite("skip_below", &OwnedProblem::skip_below);
  cls.def_readwrite("bf16", &OwnedProblem::bf16);
  cls.def_readwrite("threads", &OwnedProblem::threads);
  cls.def_property(
      "isa", [](const OwnedProblem& self) { return self.isa_name; }, &OwnedProblem::set_isa);
  cls.def_property(
      "x_strides",
      [](const OwnedProblem& self) {
        return std::array<int64_t, 4>{self.x_strides[0], self.x_strides[1], self.x_strides[2], self.x_strides[3]};
      },
      [](OwnedProblem& self, const std::array<int64_t, 4>& strides) {
        for (int i = 0; i < 4; ++i) self.x_strides[i] = strides[i];
      });
  def_code(cls, "x_element", &Problem::x_element);
  def_code(cls, "activation", &Problem::activation);
  def_code(cls, "conf_activation", &Problem::conf_activation);
  def_code(cls, "mode", &Problem::mode);
  def_code(cls, "formulation", &Problem::formulation);
  def_address(cls, "x", &Problem::x);
  def_address(cls, "expert_w1", &Problem::expert_w1);
  def_address(cls, "expert_b1", &Problem::expert_b1);
  def_address(cls, "expert_w2", &Problem::expert_w2);
  def_address(cls, "expert_b2", &Problem::expert_b2);
  def_address(cls, "gate_w1", &Problem::gate_w1);
  def_address(cls, "gate_b1", &Problem::gate_b1);
  def_address(cls, "gate_w2", &Problem::gate_w2);
  def_address(cls, "gate_b2", &Problem::gate_b2);
  def_address(cls, "gate_logits", &Problem::gate_logits);
  def_address(cls, "pos_x", &Problem::pos_x);
  def_address(cls, "pos_y", &Problem::pos_y);
  def_address(cls, "packed", &Problem::packed);
}

void bind_packing(py::module_& m) {
  m.def("cpu_formulation", [](const OwnedProblem& p) { return static_cast<int>(moe::cpu::formulation(p)); });
  m.def(
      "cpu_packed_floats",
      [](const OwnedProblem& p) {
        int64_t floats = 0;
        const moe::Status status = moe::cpu::packed_floats(p, floats);
        return std::pair(static_cast<int>(status), floats);
      },
      "The status, and the number.");
  m.def(
      "cpu_pack",
      [](const OwnedProblem& p, uintptr_t out) {
        return static_cast<int>(moe::cpu::pack(p, reinterpret_cast<float*>(out)));
      },
      py::call_guard<py::gil_scoped_release>());
}

template <typename Float>
void bind_maps(py::module_& m, const char* name) {
  using Maps = moe::HeadMaps<Float>;
  py::class_<Maps> cls(m, name);
  cls.def(py::init([] { return Maps{}; }));
  def_address(cls, "prediction", &Maps::prediction);
  def_address(cls, "confidence", &Maps::confidence);
  def_address(cls, "entropy", &Maps::entropy);
  def_address(cls, "weights", &Maps::weights);
  def_address(cls, "hypotheses", &Maps::hypotheses);
}

void bind_gradients(py::module_& m) {
  using moe::Gradients;
  py::class_<Gradients> cls(m, "Gradients");
  cls.def(py::init([] { return Gradients{}; }));
  def_address(cls, "x", &Gradients::x);
  def_address(cls, "expert_w1", &Gradients::expert_w1);
  def_address(cls, "expert_b1", &Gradients::expert_b1);
  def_address(cls, "expert_w2", &Gradients::expert_w2);
  def_address(cls, "expert_b2", &Gradients::expert_b2);
  def_address(cls, "gate_w1", &Gradients::gate_w1);
  def_address(cls, "gate_b1", &Gradients::gate_b1);
  def_address(cls, "gate_w2", &Gradients::gate_w2);
  def_address(cls, "gate_b2", &Gradients::gate_b2);
  def_address(cls, "gate_logits", &Gradients::gate_logits);
}

// What works on maps of one size, and its function.
template <typename Struct>
py::class_<Owned<Struct>> bind_call(py::module_& m, const char* name, const char* function,
                                    moe::Status (*run)(const Struct&)) {
  using Class = Owned<Struct>;
  py::class_<Class> cls(m, name);
  cls.def(py::init<>());
  cls.def_property(
      "isa", [](const Class& self) { return self.isa_name; }, &Class::set_isa);
  cls.def_readwrite("batch", &Class::batch);
  cls.def_readwrite("height", &Class::height);
  cls.def_readwrite("width", &Class::width);
  cls.def_readwrite("threads", &Class::threads);
  m.def(
      function, [run](const Class& call) { return static_cast<int>(run(call)); },
      py::call_guard<py::gil_scoped_release>());
  return cls;
}

// A layer of the decoder, and its function under the name of its kind.
template <typename Layer>
py::class_<Owned<Layer>> bind_layer(py::module_& m, const char* name, const char* function,
                                    moe::Status (*run)(const Layer&)) {
  using Class = Owned<Layer>;
  auto cls = bind_call(m, name, function, run);
  cls.def_readwrite("in_channels", &Class::in_channels);
  cls.def_readwrite("out_channels", &Class::out_channels);
  def_address(cls, "x", &Class::x);
  def_address(cls, "weights", &Class::weights);
  def_address(cls, "bias", &Class::bias);
  def_address(cls, "y", &Class::y);
  return cls;
}

void bind_layers(py::module_& m) {
  namespace cpu = moe::cpu;
  auto winograd = bind_layer<moe::WinogradLayer>(m, "WinogradLayer", "winograd", cpu::winograd);
  winograd.def_readwrite("relu_input", &moe::WinogradLayer::relu_input);
  winograd.def_readwrite("relu_residual", &moe::WinogradLayer::relu_residual);
  def_address(winograd, "residual", &moe::WinogradLayer::residual);
  def_address(winograd, "added", &moe::WinogradLayer::added);
  auto cells = bind_layer<moe::CellLayer>(m, "CellLayer", "cells", cpu::cells);
  cells.def_readwrite("stride", &moe::CellLayer::stride);
  cells.def_readwrite("scale", &moe::CellLayer::scale);
  auto upsampled = bind_layer<moe::UpsampledLayer>(m, "UpsampledLayer", "upsampled", cpu::upsampled);
  upsampled.def_readwrite("out_height", &moe::UpsampledLayer::out_height);
  upsampled.def_readwrite("out_width", &moe::UpsampledLayer::out_width);
  auto upsampling = bind_layer<moe::Upsampling>(m, "Upsampling", "upsample", cpu::upsample);
  upsampling.def_readwrite("out_height", &moe::Upsampling::out_height);
  upsampling.def_readwrite("out_width", &moe::Upsampling::out_width);
  m.def("weights_panel", [](const std::string& isa) { return cpu::weights_panel(isa.c_str()); });
}

void bind_sharpen(py::module_& m) {
  using moe::Sharpening;
  auto cls = bind_call(m, "Sharpening", "sharpen", moe::cpu::sharpen);
  cls.def_readwrite("window", &Sharpening::window);
  cls.def_readwrite("steepness", &Sharpening::steepness);
  cls.def_readwrite("edge_ratio", &Sharpening::edge_ratio);
  def_address(cls, "depth", &Sharpening::depth);
  def_address(cls, "image", &Sharpening::image);
  def_address(cls, "valid", &Sharpening::valid);
  def_address(cls, "sharp", &Sharpening::sharp);
}

#ifdef MOE3D_CUDA
void bind_cuda(py::module_& m) {
  namespace cuda = moe::cuda;
  m.attr("cuda_compiler") = MOE3D_CUDA;
  py::class_<cuda::Execution> cls(m, "Execution");
  cls.def(py::init([] { return cuda::Execution{}; }));
  cls.def_property(
      "arithmetic", [](const cuda::Execution& self) { return static_cast<int>(self.arithmetic); },
      [](cuda::Execution& self, int code) { self.arithmetic = static_cast<cuda::Arithmetic>(code); });
  cls.def_readwrite("device", &cuda::Execution::device);
  cls.def_readwrite("workspace_bytes", &cuda::Execution::workspace_bytes);
  def_address(cls, "stream", &cuda::Execution::stream);
  def_address(cls, "workspace", &cuda::Execution::workspace);
  m.def("cuda_formulation", [](const OwnedProblem& p, int arithmetic) {
    return static_cast<int>(cuda::formulation(p, static_cast<cuda::Arithmetic>(arithmetic)));
  });
  const auto def_workspace = [&](const char* name, int64_t (*bytes)(const Problem&, cuda::Arithmetic)) {
    m.def(name, [bytes](const OwnedProblem& p, int arithmetic) {
      return bytes(p, static_cast<cuda::Arithmetic>(arithmetic));
    });
  };
  def_workspace("cuda_forward_workspace", cuda::forward_workspace);
  def_workspace("cuda_backward_workspace", cuda::backward_workspace);
  m.def(
      "cuda_forward",
      [](const OwnedProblem& p, const moe::Outputs& out, const cuda::Execution& e) {
        return static_cast<int>(cuda::forward(p, out, e));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_backward",
      [](const OwnedProblem& p, const moe::Cotangents& given, const moe::Gradients& out, const cuda::Execution& e) {
        return static_cast<int>(cuda::backward(p, given, out, e));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("cuda_message", [](int status) { return std::string(cuda::message(static_cast<moe::Status>(status))); });
}
#endif

// A number that changes with the values of the arrays, of each of which it reads a few: (address, floats) pairs.
uint64_t fingerprint(const std::vector<std::pair<uintptr_t, int64_t>>& arrays) {
  constexpr int64_t kSamples = 64;
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const auto& [address, count] : arrays) {
    const auto* bits = reinterpret_cast<const uint32_t*>(address);
    const int64_t samples = std::min(count, kSamples);
    for (int64_t i = 0; i < samples; ++i) hash = (hash ^ bits[i * count / samples]) * 1099511628211u;
  }
  return hash;
}

std::vector<std::string> supported_isas() {
  const char* names[moe::cpu::kMostIsas];
  const int count = moe::cpu::supported_isas(names);
  return {names, names + count};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of moe3d; called through moe3d.ops.native.";
  m.attr("version") = MOE3D_VERSION;
  bind_problem(m);
  bind_packing(m);
  bind_maps<float>(m, "Outputs");
  bind_maps<const float>(m, "Cotangents");
  bind_gradients(m);
  bind_layers(m);
  bind_sharpen(m);
  m.def("fingerprint", fingerprint);
  m.def("supported_isas", supported_isas, "Instruction sets that this build has and this processor runs, best first.");
  m.def("has_bf16_products", [](const std::string& isa) { return moe::cpu::has_bf16_products(isa.c_str()); });
  m.def("has_thread_runtime", moe::cpu::has_thread_runtime);
  m.def(
      "cpu_forward",
      [](const OwnedProblem& p, const moe::Outputs& out) { return static_cast<int>(moe::cpu::forward(p, out)); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cpu_backward",
      [](const OwnedProblem& p, const moe::Cotangents& given, const moe::Gradients& out) {
        return static_cast<int>(moe::cpu::backward(p, given, out));
      },
      py::call_guard<py::gil_scoped_release>());
#ifdef MOE3D_CUDA
  bind_cuda(m);
#endif
}

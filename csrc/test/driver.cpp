// Runs the CPU kernels over awkward shapes without Python, for the sanitizers: every buffer has exactly its size.
// Every instruction set and number of threads must agree with the portable path on one thread. teams.cpp watches what
// takes memory.
//
//   native_driver                no more than that
//   native_driver write FILE     and keeps what the portable path computed,
//   native_driver compare FILE   or compares it with what another machine kept
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <random>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/select.h"
#include "../decoder.h"
#include "../moe_head.h"
#include "../sharpen.h"

using namespace moe;

// Exactly as large as asked for, and aligned as the decoder's layers want it.
template <typename T>
struct Aligned {
  using value_type = T;
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Floats = std::vector<float, Aligned<float>>;

namespace {

struct Shape {
  int64_t batch, channels, in_height, in_width, height, width, experts, expert_hidden, gate_hidden, outputs;
};

const Shape kShapes[] = {
    {1, 8, 5, 7, 9, 12, 2, 16, 16, 2},   {2, 7, 5, 7, 9, 70, 3, 5, 9, 2},  {1, 16, 1, 1, 5, 6, 4, 32, 33, 2},
    {1, 6, 9, 3, 4, 3, 16, 3, 20, 4},    {1, 6, 9, 3, 1, 1, 1, 32, 0, 4},  {1, 4, 40, 30, 5, 7, 2, 3, 4, 2},
    {1, 3, 6, 6, 6, 6, 2, 3, 4, 2},      {1, 2, 1, 2, 40, 1, 2, 17, 1, 2}, {2, 10, 20, 37, 35, 65, 4, 32, 16, 4},
    {1, 1, 1, 9, 1, 130, 2, 8, 8, 2},
};

Floats draw(std::mt19937& random, int64_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  Floats values(count);
  for (float& value : values) value = normal(random);
  return values;
}

struct Case {
  Case(const Shape& s, Mode mode, float skip_below, bool with_pos) {
    std::mt19937 random(1);
    const int64_t K = s.experts, C = s.channels, pixels = s.height * s.width;
    const float first = 1 / std::sqrt(9.f * static_cast<float>(C));
    x = draw(random, s.batch * C * s.in_height * s.in_width);
    w1 = draw(random, K * s.expert_hidden * C * 9, first);
    b1 = draw(random, K * s.expert_hidden, .1f);
    w2 = draw(random, K * s.outputs * s.expert_hidden, .2f);
    b2 = draw(random, K * s.outputs, .1f);
    g1 = draw(random, s.gate_hidden * C * 9, first);
    gb1 = draw(random, s.gate_hidden, .1f);
    g2 = draw(random, K * s.gate_hidden, 3);
    gb2 = draw(random, K, .1f);
    logits = draw(random, s.batch * K * pixels);
    pos_x = draw(random, s.width * (C / 2));
    pos_y = draw(random, s.height * (C / 2));
    p = {};
    p.batch = s.batch, p.channels = C, p.in_height = s.in_height, p.in_width = s.in_width;
    p.height = s.height, p.width = s.width, p.experts = K, p.expert_hidden = s.expert_hidden;
    p.outputs = s.outputs, p.gate_hidden = s.gate_hidden;
    p.x = x.data();
    const int64_t strides[4] = {C * s.in_height * s.in_width, s.in_height * s.in_width, s.in_width, 1};
    for (int i = 0; i < 4; ++i) p.x_strides[i] = strides[i];
    p.expert_w1 = w1.data(), p.expert_b1 = b1.data(), p.expert_w2 = w2.data(), p.expert_b2 = b2.data();
    if (s.gate_hidden) {
      p.gate_w1 = g1.data(), p.gate_b1 = gb1.data(), p.gate_w2 = g2.data(), p.gate_b2 = gb2.data();
      p.gate_logits = logits.data();
    }
    if (with_pos && C % 2 == 0) p.pos_x = pos_x.data(), p.pos_y = pos_y.data();
    p.temperature = .8f, p.gap = .3f, p.mode = mode, p.skip_below = skip_below;
    p.activation = s.outputs == 4 ? Activation::norm_exp : Activation::exp;
    if (mode == Mode::switch_) p.activation = Activation::exp;
    p.conf_activation = ConfActivation::expp1;
  }

  // All outputs, and all gradients but of the formulations that the backward pass does not know; one after another. The first layers are packed beforehand.
  Floats run(const char* isa, int threads, bool bf16) {
    p.isa = isa, p.threads = threads, p.bf16 = bf16;
    int64_t floats = 0;
    check(cpu::packed_floats(p, floats));
    Floats packed(floats, NAN);
    check(cpu::pack(p, packed.data()));
    p.packed = packed.data();
    const int64_t maps = p.batch * p.pixels(), predicted = p.prediction_channels();
    Floats prediction(maps * predicted, NAN), confidence(maps, NAN), entropy(maps, NAN), weights(maps * p.experts, NAN);
    check(cpu::forward(p, {prediction.data(), confidence.data(), entropy.data(), weights.data(), nullptr}));
    p.packed = nullptr;  // nothing of the backward pass
    Floats all;
    for (const Floats* part : {&prediction, &confidence, &entropy, &weights})
      all.insert(all.end(), part->begin(), part->end());
    if (p.formulation != Formulation::low_resolution) return all;
    Floats gx(x.size(), NAN), gw1(w1.size(), NAN), gb1_(b1.size(), NAN), gw2(w2.size(), NAN), gb2_(b2.size(), NAN);
    Floats gg1(g1.size(), NAN), ggb1(gb1.size(), NAN), gg2(g2.size(), NAN), ggb2(gb2.size(), NAN);
    Floats glogits(logits.size(), NAN);
    Gradients gradients = {gx.data(), gw1.data(), gb1_.data(), gw2.data(), gb2_.data(), nullptr, nullptr, nullptr,
                           nullptr, nullptr};
    const bool gate = p.has_gate();
    if (gate)
      gradients.gate_w1 = gg1.data(), gradients.gate_b1 = ggb1.data(), gradients.gate_w2 = gg2.data(),
      gradients.gate_b2 = ggb2.data(), gradients.gate_logits = glogits.data();
    const Floats ones(maps * predicted, 1.f);
    check(cpu::backward(p, {ones.data(), ones.data(), ones.data(), nullptr, nullptr}, gradients));
    for (const Floats* part : {&gx, &gw1, &gb1_, &gw2, &gb2_})
      all.insert(all.end(), part->begin(), part->end());
    for (const Floats* part : {&gg1, &ggb1, &gg2, &ggb2, &glogits})
      if (gate) all.insert(all.end(), part->begin(), part->end());
    return all;
  }

  // The features as numbers of this kind, and as they lie in memory with the channels of a pixel side by side or not.
  void set_features(Element element, bool channels_last) {
    const int64_t C = p.channels, h = p.in_height, w = p.in_width;
    const int64_t planes[4] = {C * h * w, h * w, w, 1}, pixels[4] = {C * h * w, 1, w * C, C};
    for (int i = 0; i < 4; ++i) p.x_strides[i] = (channels_last ? pixels : planes)[i];
    p.x_element = element;
    if (element == Element::float32) return;
    short_x.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x[i], sizeof bits);
      const uint32_t sign = bits >> 16 & 0x8000u, exponent = bits >> 23 & 0xffu, fraction = bits >> 13 & 0x3ffu;
      const uint32_t half = exponent > 112 ? sign | (exponent - 112) << 10 | fraction : sign;  // none is large
      short_x[i] = static_cast<uint16_t>(element == Element::bfloat16 ? bits >> 16 : half);
    }
    p.x = short_x.data();
  }

  static void check(Status status) {
    if (status != Status::ok) {
      std::printf("status %d\n", static_cast<int>(status));
      std::exit(1);
    }
  }

  Floats x, w1, b1, w2, b2, g1, gb1, g2, gb2, logits, pos_x, pos_y;
  std::vector<uint16_t> short_x;
  Problem p;
};

// Relative, over all of a and as much of b.
double distance(const Floats& a, const Floats& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    size += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / size);
}

void expect(bool holds, const char* what, const char* of, size_t shape) {
  if (holds) return;
  std::printf("%s: %s, shape %zu\n", what, of, shape);
  std::exit(1);
}

// Results that one machine writes and another, which rounds in other places, compares with its own.
class Archive {
 public:
  Archive(int argc, char** argv) : writes_(argc == 3 && !std::strcmp(argv[1], "write")) {
    if (argc == 1) return;
    const bool compares = argc == 3 && !std::strcmp(argv[1], "compare");
    if (writes_ || compares) file_ = std::fopen(argv[2], writes_ ? "wb" : "rb");
    if (file_) return;
    std::puts("usage: native_driver [write FILE | compare FILE], of a file that can be opened");
    std::exit(2);
  }
  ~Archive() {
    if (file_) std::fclose(file_);
  }

  void write_or_compare(const Floats& here, const char* what, size_t shape) {
    if (!file_) return;
    const size_t size = here.size();
    if (writes_) {
      expect(std::fwrite(here.data(), sizeof(float), size, file_) == size, "cannot be written", what, shape);
      return;
    }
    Floats there(size);
    expect(std::fread(there.data(), sizeof(float), size, file_) == size, "cannot be read", what, shape);
    expect(distance(here, there) < 1e-5, "differs from the other machine's", what, shape);
  }

 private:
  bool writes_;
  std::FILE* file_ = nullptr;
};

// --- the decoder's layers ---

struct MapShape {
  int64_t batch, height, width, in_channels, out_channels;
};

const MapShape kMaps[] = {{1, 1, 1, 16, 16}, {2, 5, 7, 48, 32}, {1, 9, 4, 32, 80}, {1, 12, 17, 16, 48}, {3, 2, 3, 64, 16}};

template <typename Layer>
void describe(Layer& layer, const MapShape& s, const Floats& x, const Floats& bias, Floats& y, const char* isa,
              int threads) {
  layer.batch = s.batch, layer.height = s.height, layer.width = s.width;
  layer.in_channels = s.in_channels, layer.out_channels = s.out_channels;
  layer.x = x.data(), layer.bias = bias.data(), layer.y = y.data(), layer.isa = isa, layer.threads = threads;
}

// [count][rows][columns] matrices as [count][panel][row][panel's columns].
Floats panels(const Floats& matrices, int64_t rows, int64_t columns, const char* isa) {
  const int64_t panel = cpu::weights_panel(isa), padded = (columns + panel - 1) / panel * panel;
  const auto count = static_cast<int64_t>(matrices.size()) / (rows * columns);
  Floats packed(count * rows * padded, 0.f);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        packed[i * rows * padded + (c / panel * rows + r) * panel + c % panel] = matrices[(i * rows + r) * columns + c];
  return packed;
}

// The outputs of all layers, one after another, with random weights: right or wrong, they must agree.
Floats run_layers(const MapShape& s, const char* isa, int threads) {
  std::mt19937 random(2);
  const int64_t C = s.in_channels, N = s.out_channels, pixels = s.batch * s.height * s.width;
  const Floats x = draw(random, pixels * C), bias = draw(random, 16 * N), maps = draw(random, pixels * N);
  Floats all;
  const auto keep = [&](const Floats& y) { all.insert(all.end(), y.begin(), y.end()); };
  {
    Floats y(pixels * N, NAN);
    const Floats weights = panels(draw(random, 36 * C * N), C, N, isa);
    WinogradLayer layer = {};
    describe(layer, s, x, bias, y, isa, threads);
    layer.weights = weights.data(), layer.residual = layer.added = maps.data();
    layer.relu_input = layer.relu_residual = true;
    Case::check(cpu::winograd(layer));
    keep(y);
  }
  for (int64_t scale : {1, 2, 4}) {
    const int64_t stride = scale == 1 ? 2 : 1, rows = (s.height + stride - 1) / stride * scale;
    const int64_t columns = (s.width + stride - 1) / stride * scale;
    Floats y(s.batch * rows * columns * N, NAN), weights;
    for (int64_t p = 0; p < scale; ++p)
      for (int64_t q = 0; q < scale; ++q) {
        const auto taps = [&](int64_t phase) { return 1 + (phase == 0) + (phase == scale - 1); };
        for (int64_t i = 0; i < taps(p); ++i) {
          const Floats part = panels(draw(random, taps(q) * C * N), taps(q) * C, N, isa);
          weights.insert(weights.end(), part.begin(), part.end());
        }
      }
    CellLayer layer = {};
    describe(layer, s, x, bias, y, isa, threads);
    layer.weights = weights.data(), layer.stride = stride, layer.scale = scale;
    Case::check(cpu::cells(layer));
    keep(y);
  }
  const int64_t rows = 2 * s.height + 1, columns = s.width == 1 ? 1 : 2 * s.width;
  {
    Floats y(s.batch * rows * columns * N, NAN);
    const Floats weights = draw(random, 9 * C * N);
    UpsampledLayer layer = {};
    describe(layer, s, x, bias, y, isa, threads);
    layer.weights = weights.data(), layer.out_height = rows, layer.out_width = columns;
    Case::check(cpu::upsampled(layer));
    keep(y);
  }
  Floats y(s.batch * rows * columns * C, NAN);
  Upsampling layer = {};
  describe(layer, s, x, bias, y, isa, threads);
  layer.out_height = rows, layer.out_width = columns;
  Case::check(cpu::upsample(layer));
  keep(y);
  return all;
}

// --- the filter ---

Floats run_filter(const MapShape& s, int64_t window, bool with_valid, const char* isa, int threads) {
  std::mt19937 random(3);
  const int64_t pixels = s.batch * s.height * s.width;
  const Floats depth = draw(random, pixels), image = draw(random, 3 * pixels);
  std::vector<uint8_t> valid(pixels);
  for (uint8_t& one : valid) one = random() % 4 > 0;
  Floats sharp(pixels, NAN);
  Sharpening pass = {};
  pass.batch = s.batch, pass.height = s.height, pass.width = s.width, pass.window = window;
  pass.steepness = 2, pass.edge_ratio = 1, pass.depth = depth.data(), pass.image = image.data();
  pass.valid = with_valid ? valid.data() : nullptr;
  pass.sharp = sharp.data(), pass.isa = isa, pass.threads = threads;
  Case::check(cpu::sharpen(pass));
  return sharp;
}

// --- threads ---

bool a_failure_leaves_its_team() {
  try {
    cpu::parallel_for(8, 3, [](int64_t, int) { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  Archive archive(argc, argv);
  expect(a_failure_leaves_its_team(), "a failure is lost", "a team of threads", 0);
  const char* isas[cpu::kMostIsas];
  const int count = cpu::supported_isas(isas);
  for (size_t s = 0; s < sizeof kShapes / sizeof *kShapes; ++s)
    for (Mode mode : {Mode::mean, Mode::argmax, Mode::switch_})
      for (float skip_below : {0.f, 1e-6f}) {
        Case test(kShapes[s], mode, skip_below, skip_below == 0);
        test.p.formulation = Formulation::low_resolution;
        const Floats truth = test.run("portable", 1, false);
        archive.write_or_compare(truth, "the head", s);
        for (Formulation formulation : {Formulation::low_resolution, Formulation::winograd, Formulation::bf16x3})
          for (int i = 0; i < count; ++i) {
            test.p.formulation = formulation;
            const Floats one = test.run(isas[i], 1, false);
            expect(distance(one, truth) < 1e-4, "differs from the portable path", isas[i], s);
            expect(test.run(isas[i], 3, false) == one, "depends on the number of threads", isas[i], s);
          }
        test.p.formulation = Formulation::low_resolution;
        for (int i = 0; i < count; ++i)
          if (cpu::has_bf16_products(isas[i])) {
            const Floats one = test.run(isas[i], 1, true);
            expect(distance(one, truth) < 0.1, "bfloat16 differs", isas[i], s);
            expect(test.run(isas[i], 3, true) == one, "bfloat16 depends on the number of threads", isas[i], s);
          }
      }
  for (size_t s : {1, 2, 8})
    for (Element element : {Element::float32, Element::bfloat16, Element::float16})
      for (bool channels_last : {false, true}) {
        Case test(kShapes[s], Mode::mean, 0, true);
        test.set_features(element, channels_last);
        test.p.formulation = Formulation::low_resolution;
        const Floats truth = test.run("portable", 1, false);
        for (Formulation formulation : {Formulation::low_resolution, Formulation::winograd, Formulation::bf16x3})
          for (int i = 0; i < count; ++i) {
            test.p.formulation = formulation;
            expect(distance(test.run(isas[i], 1, false), truth) < 1e-4, "other features differ", isas[i], s);
          }
      }
  for (size_t s = 0; s < sizeof kMaps / sizeof *kMaps; ++s) {
    const Floats truth = run_layers(kMaps[s], "portable", 1);
    archive.write_or_compare(truth, "layers", s);
    for (int i = 0; i < count; ++i) {
      const Floats one = run_layers(kMaps[s], isas[i], 1);
      expect(distance(one, truth) < 1e-5, "layers differ from the portable path", isas[i], s);
      expect(run_layers(kMaps[s], isas[i], 3) == one, "layers depend on the number of threads", isas[i], s);
    }
  }
  for (size_t s = 0; s < sizeof kMaps / sizeof *kMaps; ++s)
    for (int64_t window : {1, 3, 9})
      for (bool with_valid : {false, true}) {
        const Floats truth = run_filter(kMaps[s], window, with_valid, "portable", 1);
        archive.write_or_compare(truth, "the filter", s);
        for (int i = 0; i < count; ++i)
          for (int threads : {1, 3})
            expect(run_filter(kMaps[s], window, with_valid, isas[i], threads) == truth, "filters differ", isas[i], s);
      }
  std::printf("native driver: all shapes agree\n");
}

#include "select.h"

#include <cstring>

#include "../decoder.h"
#include "bf16.h"

namespace moe::cpu {
namespace {

struct Choice {
  const char* name;
  bool supported;
  const Kernels& (*kernels)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

constexpr int kChoices =
#if defined(__x86_64__)
    kMostIsas;
#else
    1;
#endif

const Choice* choices() {
  static const Choice all[kChoices] = {
#if defined(__x86_64__)
      {"amx", has_avx512() && amx_bf16().gemm, amx_kernels},
      {"avx512", has_avx512(), avx512_kernels},
      {"avx2", has_avx2(), avx2_kernels},
#endif
      {"portable", true, portable_kernels},
  };
  return all;
}

}  // namespace

Selected select_kernels(const char* isa) {
  const bool any = std::strcmp(isa, "auto") == 0;
  for (const Choice* c = choices(); c != choices() + kChoices; ++c) {
    if (!any && std::strcmp(isa, c->name) != 0) continue;
    if (c->supported) return {&c->kernels(), Status::ok};
    if (!any) return {nullptr, Status::isa_not_supported};
  }
  return {nullptr, Status::unknown_isa};
}

int64_t weights_panel(const char* isa) {
  const Selected selected = select_kernels(isa);
  return selected.kernels ? selected.kernels->narrow_panel : 0;
}

int supported_isas(const char* names[kMostIsas]) {
  int count = 0;
  for (const Choice* c = choices(); c != choices() + kChoices; ++c)
    if (c->supported) names[count++] = c->name;
  return count;
}

bool has_bf16_products(const char* isa) {
  const Selected selected = select_kernels(isa);
  return selected.kernels && selected.kernels->bf16.gemm;
}

}  // namespace moe::cpu

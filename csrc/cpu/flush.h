#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace moe::cpu {

// While it lives, its thread's results below the smallest normal float become 0. A decided gate's gradients reach that
// far down, and x86 processors take a hundred cycles and more for each; others compute them like any number.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before_); }
#else
  FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

#if defined(__x86_64__)
 private:
  const unsigned before_;
#endif
};

}  // namespace moe::cpu

#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "plan.h"

namespace moe::cpu {

// Floats aligned to a cache line, not initialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(count > 0 ? count : 1, 16) * sizeof(float)))) {
    if (!data_) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  float* data() { return data_; }
  const float* data() const { return data_; }
  float* operator+(int64_t at) { return data_ + at; }
  const float* operator+(int64_t at) const { return data_ + at; }

 private:
  float* data_ = nullptr;
};

inline Buffer zeros(int64_t count) {
  Buffer buffer(count);
  std::memset(buffer.data(), 0, count * sizeof(float));
  return buffer;
}

}  // namespace moe::cpu

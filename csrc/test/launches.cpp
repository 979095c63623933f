// Launches (../cuda/launch.h) on a runtime that is made up: with another thread's between two calls of one, and after
// calls that failed.
#include "../cuda/launch.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <utility>

namespace {

constexpr int kOptIn = 227 << 10;

cudaError_t last_error = cudaSuccess;
int device = 0;
std::map<std::pair<const void*, int>, int> limits;  // by kernel and device
int settings = 0;                                   // calls of cudaFuncSetAttribute
std::function<void()> after_setting;                // what another thread does then, once
bool setting_fails = false;

cudaError_t returned(bool good) {
  if (!good) last_error = cudaErrorInvalidValue;
  return good ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* out) {
  *out = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kOptIn;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ++settings;
  if (setting_fails || value > kOptIn) return returned(false);
  limits[{kernel, device}] = value;
  if (const auto other = std::exchange(after_setting, nullptr)) other();
  return returned(true);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t shared_bytes, cudaStream_t) {
  const auto limit = limits.find({kernel, device});
  return returned(shared_bytes <= static_cast<size_t>(limit == limits.end() ? 48 << 10 : limit->second));
}

namespace {

bool runs(moe::cuda::Launcher& kernel, size_t kilobytes) {
  return kernel.launch(1, 32, nullptr, kilobytes << 10, nullptr) == moe::Status::ok;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::puts(what);
  std::exit(1);
}

}  // namespace

int main() {
  const int names[2] = {};
  moe::cuda::Launcher first(&names[0]), second(&names[1]);

  after_setting = [&] { expect(runs(first, 80), "a smaller launch fails"); };
  expect(runs(first, 105), "another thread's smaller launch takes the shared memory away");

  settings = 0;
  expect(runs(first, 200) && runs(first, 60) && settings == 0, "the limit is set more than once");
  device = 1;
  expect(runs(first, 105), "the limit of another device is not set");
  expect(runs(second, 105), "the limit of another kernel is not set");

  expect(!runs(first, 300), "a launch that fails counts as good");
  expect(runs(first, 105), "a good launch fails because of the one before");

  device = 2;
  setting_fails = true;
  expect(!runs(first, 105), "a limit that cannot be set goes unnoticed");
  setting_fails = false;
  expect(runs(first, 16), "a good launch fails because of the limit that could not be set");
  expect(runs(first, 105), "a limit that could not be set is not tried again");
  std::puts("launches: none disturbs another");
}

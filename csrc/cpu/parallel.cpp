#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace moe::cpu {
namespace {

// The entry point behind `#pragma omp parallel`, exported by GCC's, LLVM's and Intel's runtimes alike.
using ParallelEntry = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// Linking a runtime would load a second one wherever PyTorch bundles its own under another name. PyTorch loads its
// dependencies globally before it loads us, so the symbol is there to be found.
ParallelEntry parallel_entry() {
  static const auto entry = reinterpret_cast<ParallelEntry>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

struct Loop {
  int64_t count;
  const std::function<void(int64_t, int)>& task;
  std::atomic<int64_t> next{0};
  std::atomic<int> slots{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure{};  // the first one

  static void work(void* self) {
    Loop& loop = *static_cast<Loop*>(self);
    const int slot = loop.slots++;
    try {
      for (int64_t i; (i = loop.next++) < loop.count;) loop.task(i, slot);
    } catch (...) {  // the runtime ends the process where an exception reaches it
      loop.next = loop.count;
      if (!loop.failed.exchange(true)) loop.failure = std::current_exception();
    }
  }
};

}  // namespace

bool has_thread_runtime() { return parallel_entry() != nullptr; }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& task) {
  Loop loop{count, task};
  const auto team = static_cast<unsigned>(std::min<int64_t>(threads, count));
  if (team > 1 && has_thread_runtime())
    parallel_entry()(Loop::work, &loop, team, 0);
  else
    Loop::work(&loop);
  if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace moe::cpu

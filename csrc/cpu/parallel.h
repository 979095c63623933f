// Threads of the OpenMP runtime that is in the process already, which is PyTorch's; none of our own is ever loaded.
#pragma once

#include <cstdint>
#include <functional>

namespace moe::cpu {

// Whether a runtime was found. Without one everything runs on the calling thread.
bool has_thread_runtime();

// Calls task(i, slot) once for each i in [0, count), in increasing order of i, on at most `threads` threads. Calls that
// run at the same time have different slots below `threads`, so that a slot can own working memory. If one throws, no
// more are begun, and the exception comes out when all that run have ended.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& task);

}  // namespace moe::cpu

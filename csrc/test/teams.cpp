// Watches the driver's teams of threads: whatever takes memory inside one ends the process. Workers are made before a
// team starts, with all that they need, and nothing is half done when there is no more memory.
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

thread_local bool in_team = false;

void refuse_in_team(size_t bytes) {
  if (!in_team) return;
  std::fprintf(stderr, "%zu bytes are taken inside a team of threads\n", bytes);
  std::abort();
}

struct Team {
  void (*work)(void*);
  void* data;

  static void run(void* self) {
    const Team& team = *static_cast<Team*>(self);
    in_team = true;
    team.work(team.data);
    in_team = false;
  }
};

}  // namespace

extern "C" {

// The linker's --wrap sends the library's calls here: those of Buffer, and those of operator new.
void* __real_aligned_alloc(size_t alignment, size_t bytes);
void* __wrap_aligned_alloc(size_t alignment, size_t bytes) {
  refuse_in_team(bytes);
  return __real_aligned_alloc(alignment, bytes);
}
void* __real__Znwm(size_t bytes);
void* __wrap__Znwm(size_t bytes) {
  refuse_in_team(bytes);
  return __real__Znwm(bytes);
}

// parallel_for finds this one before the runtime's.
__attribute__((visibility("default"))) void GOMP_parallel(void (*work)(void*), void* data, unsigned threads,
                                                          unsigned flags) {
  using Entry = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto runtime = reinterpret_cast<Entry>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Team team = {work, data};
  runtime(Team::run, &team, threads, flags);
}
}

// topd::advise_huge_pages: ask the kernel to back a fresh buffer with huge pages. The first touch of a tile costs more in page
// faults of 4 KiB than a sweep over it. A huge page that the kernel has at hand takes about 0.25 ms. One that it must put
// together first, or that a virtual machine must get back from its host, takes milliseconds, far more than the same memory in
// small pages: after the first such page the rest of the buffer is left to small ones. Where huge pages are not to be had,
// nothing changes.

#include "../ops.h"

#if defined(__linux__)
#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#endif

namespace topd {
inline namespace CPU_CAPABILITY {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr auto kSlow = std::chrono::milliseconds(1);

uintptr_t rounded_up(uintptr_t place, uintptr_t unit) { return (place + unit - 1) / unit * unit; }

// Touch each huge page; return whether all came fast. The clock is the wall's: a thread's own does not count the wait for a
// host.
bool touch_huge_pages(uintptr_t from, uintptr_t to) {
  const uintptr_t first = rounded_up(from, kHugePage);
  const int64_t pages = first < to ? static_cast<int64_t>((to - first) / kHugePage) : 0;
  std::atomic<bool> fast{true};
  at::parallel_for(0, pages, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && fast.load(std::memory_order_relaxed); ++i) {
      const auto start = std::chrono::steady_clock::now();
      *reinterpret_cast<volatile char*>(first + static_cast<uintptr_t>(i) * kHugePage) = 0;
      if (std::chrono::steady_clock::now() - start > kSlow) fast.store(false, std::memory_order_relaxed);
    }
  });
  return fast.load();
}

}  // namespace
#endif

void advise_huge_pages(at::Tensor& buffer) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t from = rounded_up(start, page), to = (start + buffer.nbytes()) / page * page;
  if (from >= to) return;
  const auto advise = [&](int advice) { madvise(reinterpret_cast<void*>(from), to - from, advice); };  // a refusal is no error
  advise(MADV_HUGEPAGE);
  if (!touch_huge_pages(from, to)) advise(MADV_NOHUGEPAGE);
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace topd

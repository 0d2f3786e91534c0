// topd::advise_huge_pages: ask the kernel to back a fresh buffer with huge pages. The first touch of a tile costs more in page
// faults of 4 KiB than a sweep over it; where huge pages are not to be had, nothing changes.

#include "../ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace topd {
inline namespace CPU_CAPABILITY {

void advise_huge_pages(at::Tensor& buffer) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t from = (start + page - 1) / page * page, to = (start + buffer.nbytes()) / page * page;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // advice: a refusal is no error
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace topd

// A sweep goes over the entries of one row, a vector at a time.
#pragma once

#include <algorithm>

#include "lanes.h"

// A body of a sweep stands at two places of it: as a function of its own it would spill every accumulator.
#if defined(_MSC_VER)
#define TOPD_INLINE
#else
#define TOPD_INLINE __attribute__((always_inline))
#endif

namespace topd {
inline namespace CPU_CAPABILITY {

// Entries summed in T lanes before the sum goes on in double.
constexpr int64_t kBlock = 1024;

// Entries that are worth a thread.
constexpr int64_t kGrain = 32768;

// Calls visit(offset, lanes) for each vector of [0, size) and close(block) after each block.
template <typename T, typename Visit, typename Close>
inline void sweep(int64_t size, const Visit& visit, const Close& close) {
  for (int64_t block = 0; block < size; block += kBlock) {
    const int64_t end = std::min(block + kBlock, size);
    int64_t offset = block;
    for (; offset + Vec<T>::size() <= end; offset += Vec<T>::size()) visit(offset, static_cast<int64_t>(Vec<T>::size()));
    if (offset < end) visit(offset, end - offset);
    close(block);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace topd

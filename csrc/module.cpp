// Registers the CPU kernels with the dispatcher when the library is loaded.

#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY_IMPL(topd, CPU, m) {
  m.impl("divergence_rows", &topd::divergence_rows);
  m.impl("logprob_rows", &topd::logprob_rows);
  m.impl("weighted_gather", &topd::weighted_gather);
  m.impl("weighted_scatter", &topd::weighted_scatter);
  m.impl("transport", &topd::transport);
  m.impl("bf16_addmm", &topd::bf16_addmm);
  m.impl("advise_huge_pages", &topd::advise_huge_pages);
}

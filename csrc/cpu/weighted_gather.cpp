// topd::weighted_gather on the CPU: out[n] += sum_m weights[n, m] table[ids[n, m]], each row of out by one thread, in the order
// of m.

#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "../shared/weighted_rows.h"

namespace topd {
inline namespace CPU_CAPABILITY {

void weighted_gather(at::Tensor& out, const at::Tensor& table, const at::Tensor& ids, const at::Tensor& weights) {
  const WeightedRows call(out, table, ids, weights, "table");
  const int64_t rows = ids.size(0), chosen = ids.size(1), width = out.size(1), vocab = table.size(0);
  TORCH_CHECK_VALUE(out.size(0) == rows, "out must have a row for each row of ids, got ", out.sizes());
  call.dispatch([&](auto sum, auto entry) {
    using Sum = decltype(sum);
    using Entry = decltype(entry);
    const Entry* const from = table.const_data_ptr<Entry>();
    Sum* const to = out.data_ptr<Sum>();
    at::parallel_for(0, rows, call.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t m = 0; m < chosen; ++m) {
          const int64_t id = call.id(n * chosen + m);
          const Sum weight = call.template weight<Sum>(n * chosen + m);
          if (weight == 0 || id < 0 || id >= vocab) continue;
          add_row(to + n * width, from + id * table.stride(0), weight, width);
        }
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace topd

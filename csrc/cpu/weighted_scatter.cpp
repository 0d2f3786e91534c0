// topd::weighted_scatter on the CPU: out[ids[n, m]] += weights[n, m] rows[n]. The entries are sorted by id, stably, and each
// id's row of out is written by one thread: the same bits for any number of threads.

#include "../ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../shared/weighted_rows.h"

namespace topd {
inline namespace CPU_CAPABILITY {

void weighted_scatter(at::Tensor& out, const at::Tensor& rows, const at::Tensor& ids, const at::Tensor& weights) {
  const WeightedRows call(out, rows, ids, weights, "rows");
  const int64_t chosen = ids.size(1), entries = ids.numel(), width = out.size(1), vocab = out.size(0);
  TORCH_CHECK_VALUE(rows.size(0) == ids.size(0), "rows must have a row for each row of ids, got ", rows.sizes());
  std::vector<int64_t> order;
  order.reserve(entries);
  for (int64_t i = 0; i < entries; ++i) {
    if (call.id(i) >= 0 && call.id(i) < vocab) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return call.id(i) < call.id(j); });
  std::vector<int64_t> starts;  // of each id's run
  for (size_t i = 0; i < order.size(); ++i) {
    if (i == 0 || call.id(order[i]) != call.id(order[i - 1])) starts.push_back(static_cast<int64_t>(i));
  }
  const auto runs = static_cast<int64_t>(starts.size());
  starts.push_back(static_cast<int64_t>(order.size()));
  call.dispatch([&](auto sum, auto entry) {
    using Sum = decltype(sum);
    using Entry = decltype(entry);
    const Entry* const from = rows.const_data_ptr<Entry>();
    Sum* const to = out.data_ptr<Sum>();
    at::parallel_for(0, runs, call.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) {
        for (int64_t k = starts[run]; k < starts[run + 1]; ++k) {
          const Sum weight = call.template weight<Sum>(order[k]);
          if (weight == 0) continue;
          add_row(to + call.id(order[k]) * width, from + order[k] / chosen * rows.stride(0), weight, width);
        }
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace topd

// Packing of rows into micro-batches: the same cuts as algorithms/micro_batch.py, which explains them.
#pragma once

#include <cstdint>
#include <vector>

namespace trialign {

using Cuts = std::vector<std::vector<int64_t>>;

Cuts micro_batches(std::vector<int64_t> rows, const std::vector<int64_t>& lengths, int64_t size, int64_t max_tokens,
                   bool by_length);
Cuts deal_micro_batches(const std::vector<int64_t>& rows, const std::vector<int64_t>& lengths, int64_t parts,
                        int64_t rank, int64_t size, int64_t max_tokens);

}  // namespace trialign

#include "micro_batch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace trialign {
namespace {

void sort_by_length(std::vector<int64_t>& rows, const std::vector<int64_t>& lengths) {
  std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) {
    return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b;
  });
}

Cuts deal(const std::vector<int64_t>& lengths, int64_t parts) {
  const auto count = static_cast<int64_t>(lengths.size());
  const int64_t least = count / parts, more = count % parts;
  if (!least)
    throw std::invalid_argument(std::to_string(count) + " samples are fewer than " + std::to_string(parts) +
                                " data-parallel ranks");
  std::vector<int64_t> order(count), tokens(parts, 0);
  std::iota(order.begin(), order.end(), 0);
  sort_by_length(order, lengths);
  Cuts dealt(parts);
  int64_t larger = 0;  // parts with more than `least` rows
  for (int64_t row : order) {
    const int64_t limit = least + (more > larger);
    int64_t part = -1;
    for (int64_t i = 0; i < parts; ++i)
      if (static_cast<int64_t>(dealt[i].size()) < limit && (part < 0 || tokens[i] < tokens[part])) part = i;
    dealt[part].push_back(row);
    tokens[part] += lengths[row];
    larger += static_cast<int64_t>(dealt[part].size()) > least;
  }
  for (auto& rows : dealt) std::sort(rows.begin(), rows.end());
  return dealt;
}

}  // namespace

Cuts micro_batches(std::vector<int64_t> rows, const std::vector<int64_t>& lengths, int64_t size, int64_t max_tokens,
                   bool by_length) {
  if (by_length) sort_by_length(rows, lengths);
  Cuts cuts;
  int64_t room = 0;
  for (int64_t row : rows) {
    if (max_tokens && lengths[row] > max_tokens)
      throw std::invalid_argument("a sample of " + std::to_string(lengths[row]) +
                                  " tokens does not fit micro-batches of " + std::to_string(max_tokens) + " tokens");
    const int64_t cost = max_tokens ? lengths[row] : 1;
    if (cost > room || cuts.empty()) {
      cuts.emplace_back();
      room = max_tokens ? max_tokens : size;
    }
    cuts.back().push_back(row);
    room -= cost;
  }
  return cuts;
}

Cuts deal_micro_batches(const std::vector<int64_t>& rows, const std::vector<int64_t>& lengths, int64_t parts,
                        int64_t rank, int64_t size, int64_t max_tokens) {
  std::vector<int64_t> own_lengths;
  for (int64_t row : rows) own_lengths.push_back(lengths[row]);
  const Cuts dealt = deal(own_lengths, parts);
  Cuts own;
  size_t most = 0;
  for (int64_t i = 0; i < parts; ++i) {
    std::vector<int64_t> part;
    for (int64_t place : dealt[i]) part.push_back(rows[place]);
    Cuts cuts = micro_batches(std::move(part), lengths, size, max_tokens, true);
    most = std::max(most, cuts.size());
    if (i == rank) own = std::move(cuts);
  }
  while (own.size() < std::min(most, dealt[rank].size())) {
    const auto largest = std::max_element(own.begin(), own.end(),
                                          [](const auto& a, const auto& b) { return a.size() < b.size(); });
    const auto half = static_cast<std::ptrdiff_t>(largest->size() / 2);
    std::vector<int64_t> second(largest->begin() + half, largest->end());
    largest->resize(half);
    own.insert(largest + 1, std::move(second));
  }
  return own;
}

}  // namespace trialign

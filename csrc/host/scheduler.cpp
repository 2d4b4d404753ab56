#include "scheduler.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace trialign {
namespace {

int64_t blocks_for(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }

// Where Python asserts: a fault of this code or its caller, never of a user's input.
void check(bool condition, const char* message) {
  if (!condition) throw std::logic_error(message);
}

}  // namespace

bool Step::masked() const {
  return std::any_of(rows.begin(), rows.end(), [](const auto& s) { return s->params.min_new_tokens > 0; });
}

BlockPool::BlockPool(int64_t num_blocks) : num_blocks(num_blocks), free_(num_blocks), users_(num_blocks, 0) {
  std::iota(free_.rbegin(), free_.rend(), 0);
}

int64_t BlockPool::allocate() {
  check(!free_.empty(), "more blocks than are free");
  const int64_t block = free_.back();
  free_.pop_back();
  users_[block] = 1;
  return block;
}

void BlockPool::free(const std::vector<int64_t>& blocks) {
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    check(--users_[*block] >= 0, "a block was freed twice");
    if (users_[*block] == 0) free_.push_back(*block);
  }
}

Scheduler::Scheduler(int64_t block_size, int64_t num_blocks, int64_t max_running, int64_t prefill_tokens,
                     int64_t lanes)
    : block_size(block_size),
      pool(num_blocks),
      running(lanes),
      max_running_(max_running),
      prefill_tokens_(prefill_tokens) {}

void Scheduler::reset() {
  check(idle() && pool.free_blocks() == pool.num_blocks, "blocks leaked");
  lane_size = width = done = total = plans_ = 0;
  prompt_ids_.clear();
  cached_.clear();
  starving_.clear();
}

bool Scheduler::any_running() const {
  return std::any_of(running.begin(), running.end(), [](const Rows& rows) { return !rows.empty(); });
}

bool Scheduler::idle() const { return alive == 0 && !any_running(); }

int64_t Scheduler::blocks_of(int64_t prompt, int64_t max_new_tokens) const {
  return blocks_for(prompt + max_new_tokens - 1, block_size);
}

void Scheduler::add(int64_t id, std::vector<int64_t> prompt, Params params, int64_t key) {
  const int64_t prompt_id = prompt_ids_.try_emplace(prompt, prompt_ids_.size()).first->second;
  if (prompt_id == static_cast<int64_t>(cached_.size())) cached_.emplace_back();
  auto sequence = std::make_shared<Sequence>(Sequence{id, key, prompt_id, std::move(prompt), std::move(params)});
  ++alive;
  total += sequence->params.max_new_tokens;
  width = std::max(width, blocks_of(sequence->prompt_tokens(), sequence->params.max_new_tokens));
  waiting.push_back(std::move(sequence));
  // Lanes are filled evenly: otherwise one would run everything, and the other stages' turns would be empty.
  lane_size = std::max(lane_size, blocks_for(std::min(max_running_, alive), running.size()));
}

void Scheduler::abort(const std::optional<std::vector<int64_t>>& ids) {
  Rows wanted(waiting.begin(), waiting.end());
  for (const Rows& rows : running) wanted.insert(wanted.end(), rows.begin(), rows.end());
  for (const auto& sequence : wanted)
    if (!ids || std::find(ids->begin(), ids->end(), sequence->id) != ids->end()) end(sequence, Finish::abort);
}

void Scheduler::retire(int64_t lane) {
  Rows kept;
  kept.reserve(running[lane].size());
  for (auto& sequence : running[lane]) {
    if (sequence->complete()) {
      free(*sequence);
      if (sequence->finish != Finish::running) ended_.push_back(sequence);
    } else if (sequence->leaving) {
      sequence->leaving = false;
      requeue(Rows{sequence});
    } else {
      kept.push_back(std::move(sequence));
    }
  }
  running[lane] = std::move(kept);
}

std::shared_ptr<Step> Scheduler::plan(int64_t lane) {
  ++plans_;
  const std::optional<bool> preempted = preempt(lane);
  if (!preempted) {
    starving_.insert(lane);
    return nullptr;
  }
  starving_.erase(lane);
  Rows& rows = running[lane];
  auto step = std::make_shared<Step>();
  step->kept = static_cast<int64_t>(rows.size());
  step->block_size = block_size;
  step->spare = pool.num_blocks;
  for (int64_t row = 0; row < step->kept; ++row) {
    Sequence& sequence = *rows[row];
    if (!grows(sequence)) continue;
    const int64_t block = pool.allocate();
    step->grown.insert(step->grown.end(), {row, static_cast<int64_t>(sequence.blocks.size()), block});
    sequence.blocks.push_back(block);
  }
  Rows sharing, prefilled;
  if (!*preempted && starving_.empty()) admit(lane, sharing, prefilled, step->copies);
  rows.insert(rows.end(), sharing.begin(), sharing.end());
  rows.insert(rows.end(), prefilled.begin(), prefilled.end());
  if (rows.empty()) return nullptr;
  step->decoding = step->kept + static_cast<int64_t>(sharing.size());
  step->tokens = step->decoding;
  for (const auto& sequence : prefilled) step->tokens += sequence->length();
  step->in_place = true;
  step->moved.resize(step->kept);
  for (int64_t row = 0; row < static_cast<int64_t>(rows.size()); ++row) {
    if (row < step->kept) {
      step->moved[row] = rows[row]->row;
      step->in_place = step->in_place && rows[row]->row == row;
    }
    rows[row]->row = row;
    ++rows[row]->planned;
  }
  step->rows = rows;
  return step;
}

void Scheduler::commit(const Step& step, const double* results, int64_t version) {
  for (int64_t row = 0; row < step.size(); ++row)
    if (results[2 * row] < 0) throw std::invalid_argument("logits hold NaN, +inf or only -inf: no token can be sampled");
  for (int64_t row = 0; row < step.size(); ++row) {
    const auto& sequence = step.rows[row];
    if (sequence->finish != Finish::running) continue;
    const auto token = static_cast<int64_t>(results[2 * row]);
    const Params& params = sequence->params;
    sequence->tokens.push_back(token);
    sequence->logprobs.push_back(results[2 * row + 1]);
    sequence->versions.push_back(version);
    ++done;
    if (std::find(params.stop_ids.begin(), params.stop_ids.end(), token) != params.stop_ids.end())
      end(sequence, Finish::stop);
    else if (static_cast<int64_t>(sequence->tokens.size()) == params.max_new_tokens)
      end(sequence, Finish::length);
  }
}

Rows Scheduler::take_ended() { return std::exchange(ended_, {}); }

void Scheduler::requeue() {
  Rows all;
  for (int64_t lane = 0; lane < static_cast<int64_t>(running.size()); ++lane) retire(lane);
  for (Rows& rows : running) {
    all.insert(all.end(), rows.begin(), rows.end());
    rows.clear();
  }
  requeue(std::move(all));
}

bool Scheduler::grows(const Sequence& sequence) const {
  const int64_t cached = sequence.prompt_tokens() + sequence.planned;
  return blocks_for(cached, block_size) > static_cast<int64_t>(sequence.blocks.size());
}

// Preempts the youngest sequences until the rows of `lane` can grow: whether some of this lane were, or nothing where
// the lane must wait for blocks that other lanes free in their turns.
std::optional<bool> Scheduler::preempt(int64_t lane) {
  Rows& rows = running[lane];
  bool preempted = false;
  while (std::count_if(rows.begin(), rows.end(), [&](const auto& s) { return grows(*s); }) > pool.free_blocks()) {
    std::shared_ptr<Sequence> victim;
    int64_t candidates = 0;
    bool leaving = false;
    for (const Rows& lane_rows : running)
      for (const auto& sequence : lane_rows) {
        leaving = leaving || sequence->leaving;
        if (sequence->complete() || sequence->leaving) continue;
        ++candidates;
        if (!victim || sequence->id > victim->id) victim = sequence;
      }
    const auto own = std::find(rows.begin(), rows.end(), victim);
    if (candidates == 1 || own == rows.end()) {
      // Victims in other lanes have a step in flight; one at a time, since each may free enough.
      if (!leaving && candidates > 1) {
        victim->leaving = true;
        ++preemptions;
      }
      return std::nullopt;
    }
    rows.erase(own);
    preempted = true;
    ++preemptions;
    requeue(Rows{victim});
  }
  return preempted;
}

void Scheduler::admit(int64_t lane, Rows& sharing, Rows& prefilled, std::vector<int64_t>& copies) {
  Rows followers;  // of prompts that this step prefills
  const int64_t rows = lane_size - static_cast<int64_t>(running[lane].size());
  int64_t budget = prefill_tokens_;
  const int64_t spare = any_running() ? pool.num_blocks / 100 : 0;  // for the running sequences to grow
  while (!waiting.empty() && static_cast<int64_t>(sharing.size() + prefilled.size()) < rows) {
    const std::shared_ptr<Sequence> sequence = waiting.front();
    Rows& cached = cached_[sequence->prompt_id];
    const std::shared_ptr<Sequence> source = sequence->tokens.empty() && !cached.empty() ? cached.front() : nullptr;
    if (source && source->started == plans_) {
      followers.push_back(sequence);
      waiting.pop_front();
      continue;
    }
    const int64_t shared = (sequence->prompt_tokens() - 1) / block_size;  // the block of the prompt's last token
    const int64_t place = (sequence->prompt_tokens() - 1) % block_size;
    const int64_t count = source ? 1 : blocks_for(sequence->length(), block_size);
    if (count > pool.free_blocks() - spare) break;
    if (source) {
      sequence->blocks.assign(source->blocks.begin(), source->blocks.begin() + shared);
      for (int64_t block : sequence->blocks) pool.share(block);
      sharing.push_back(sequence);
    } else {
      if (!prefilled.empty() && sequence->length() > budget) break;
      budget -= sequence->length();
      prefilled.push_back(sequence);
    }
    waiting.pop_front();
    for (int64_t i = 0; i < count; ++i) sequence->blocks.push_back(pool.allocate());
    if (source && place) copies.insert(copies.end(), {source->blocks[shared], sequence->blocks[shared]});
    sequence->planned = static_cast<int64_t>(sequence->tokens.size());
    sequence->started = plans_;
    cached.push_back(sequence);
  }
  waiting.insert(waiting.begin(), followers.begin(), followers.end());
}

void Scheduler::requeue(Rows sequences) {
  for (const auto& sequence : sequences) {
    free(*sequence);
    sequence->planned = 0;
  }
  std::sort(sequences.begin(), sequences.end(), [](const auto& a, const auto& b) { return a->id < b->id; });
  waiting.insert(waiting.begin(), sequences.begin(), sequences.end());
}

void Scheduler::free(Sequence& sequence) {
  pool.free(sequence.blocks);
  sequence.blocks.clear();
  std::erase_if(cached_[sequence.prompt_id], [&](const auto& other) { return other.get() == &sequence; });
}

void Scheduler::end(const std::shared_ptr<Sequence>& sequence, Finish finish) {
  if (sequence->finish != Finish::running) return;
  sequence->finish = finish;
  --alive;
  done += sequence->params.max_new_tokens - static_cast<int64_t>(sequence->tokens.size());
  if (!sequence->blocks.empty()) return;  // `retire` ends it
  if (!sequence->planned) std::erase(waiting, sequence);
  ended_.push_back(sequence);
}

}  // namespace trialign

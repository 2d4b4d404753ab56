// Scheduler of the embedded generator: the same steps as engine/generation/scheduler.py, which explains them.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace trialign {

enum class Finish { running, stop, length, abort };

// What a request asks for: SamplingParams of engine/generation/interface.py.
struct Params {
  int64_t max_new_tokens, min_new_tokens, top_k;
  double temperature, top_p;
  std::vector<int64_t> stop_ids;
};

struct Sequence {
  int64_t id, key, prompt_id;
  std::vector<int64_t> prompt;
  Params params;
  std::vector<int64_t> blocks, tokens, versions;
  std::vector<double> logprobs;
  Finish finish = Finish::running;
  int64_t planned = 0, started = 0, row = 0;
  bool leaving = false;  // preempted for another lane; the next turn of its own frees its row

  int64_t prompt_tokens() const { return static_cast<int64_t>(prompt.size()); }
  int64_t length() const { return static_cast<int64_t>(prompt.size() + tokens.size()); }
  int64_t token(int64_t position) const {
    return position < prompt_tokens() ? prompt[position] : tokens[position - prompt_tokens()];
  }
  bool complete() const { return finish != Finish::running || planned == params.max_new_tokens; }
};

using Rows = std::vector<std::shared_ptr<Sequence>>;

struct Step {
  Rows rows;
  int64_t kept, decoding, tokens, block_size, spare;
  bool in_place;                // the kept rows are the first ones of the lane's last step
  std::vector<int64_t> moved;   // [kept], their places in that step
  std::vector<int64_t> copies;  // [blocks, 2]
  std::vector<int64_t> grown;   // [blocks, 3]

  int64_t size() const { return static_cast<int64_t>(rows.size()); }
  bool masked() const;
};

// Free list of block numbers, and the users of each block.
class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  int64_t allocate();
  void share(int64_t block) { ++users_[block]; }
  void free(const std::vector<int64_t>& blocks);
  int64_t free_blocks() const { return static_cast<int64_t>(free_.size()); }

  const int64_t num_blocks;

 private:
  std::vector<int64_t> free_, users_;
};

class Scheduler {
 public:
  Scheduler(int64_t block_size, int64_t num_blocks, int64_t max_running, int64_t prefill_tokens, int64_t lanes);

  void reset();
  bool idle() const;
  int64_t blocks_of(int64_t prompt, int64_t max_new_tokens) const;
  void add(int64_t id, std::vector<int64_t> prompt, Params params, int64_t key);
  void abort(const std::optional<std::vector<int64_t>>& ids);
  void retire(int64_t lane);
  std::shared_ptr<Step> plan(int64_t lane);  // null where there is none
  void commit(const Step& step, const double* results, int64_t version);
  Rows take_ended();
  void requeue();

  const int64_t block_size;
  BlockPool pool;
  std::deque<std::shared_ptr<Sequence>> waiting;
  std::vector<Rows> running;
  int64_t alive = 0, preemptions = 0, lane_size = 0, width = 0, done = 0, total = 0;

 private:
  bool grows(const Sequence& sequence) const;
  std::optional<bool> preempt(int64_t lane);
  void admit(int64_t lane, Rows& sharing, Rows& prefilled, std::vector<int64_t>& copies);
  void requeue(Rows sequences);
  void free(Sequence& sequence);
  void end(const std::shared_ptr<Sequence>& sequence, Finish finish);
  bool any_running() const;

  const int64_t max_running_, prefill_tokens_;
  int64_t plans_ = 0;
  Rows ended_;
  std::map<std::vector<int64_t>, int64_t> prompt_ids_;
  std::vector<Rows> cached_;  // by prompt id: running sequences, by admission
  std::set<int64_t> starving_;  // lanes that wait for blocks: meanwhile no sequence is admitted
};

}  // namespace trialign

// Threads for ops of microseconds, as in a decode step: a job starts and ends without a system call while the threads are awake.
//
// torch's own threads (OpenMP) cut a job into one fixed share a thread and meet in a barrier. A step of a small model has hundreds of
// jobs, so that one thread which another process keeps from its core holds up all of them, each by a time slice of the scheduler. Here
// a thread takes its share piece by piece, and those that are done take over what others have left.
#pragma once
#include <cstdint>

namespace trialign {

// fn(context, begin, end) over [0, n), in pieces of at most `grain`, on the calling thread and up to threads - 1 others. Which thread
// runs a piece is not fixed. A second caller meanwhile, and the child of a fork, run theirs alone or on threads of their own.
void run_pieces(int64_t n, int64_t grain, int64_t threads, void (*fn)(void*, int64_t, int64_t), void* context);

}  // namespace trialign

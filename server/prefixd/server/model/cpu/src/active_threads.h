// How many threads of a pool compute.
#pragma once
#include <cstdint>

namespace pfx {

// Chooses between 1 and `most` threads by what the last of them gains and what waiting costs.
//
// A thread that shares its core with another process loses it while it holds an item, and the
// others wait for milliseconds. The time that one thread more has saved is added to a balance of at
// most kMost_ns, and the time lost by waiting is taken off. Below zero, one thread fewer computes,
// until it is tried again: after kFirstRest_ns, and twice as long each time it is lost again soon.
// A trial begins with kMost_ns too: a step often begins next to another thread of the process, which
// sends the last step's results, and gains more afterwards than it lost there.
// Pure: all times, in nanoseconds, come in as arguments.
class ActiveThreads {
public:
    explicit ActiveThreads(int most) : most_(most), count_(most) {}

    int count() const { return count_; }
    int64_t changes() const { return changes_; }

    // Takes a thread back whose rest is over; whether it did.
    bool try_again(int64_t now);
    // Of `items` the caller did `own` in work_ns, then waited wait_ns for the others.
    void end_phase(int64_t now, int items, int own, int64_t work_ns, int64_t wait_ns);
    // In this step the caller was ready to run for lost_ns, on a core that another thread had.
    void end_step(int64_t now, int64_t lost_ns);

    static constexpr int64_t kMost_ns = 20'000'000;
    static constexpr int64_t kFirstRest_ns = 20'000'000, kLongestRest_ns = 2'000'000'000;

private:
    void add(int64_t now, int64_t gain_ns);

    const int most_;
    int count_;
    int64_t changes_ = 0;  // of count_
    int64_t balance_ns_ = kMost_ns;
    int64_t step_gain_ns_ = 0;  // of the phases of this step
    int64_t rest_ns_ = kFirstRest_ns;
    int64_t retry_at_ = 0, raised_at_ = 0;
    bool raised_ = false;  // since a thread was last lost
};

}  // namespace pfx

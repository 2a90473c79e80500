#include "active_threads.h"

#include <algorithm>

namespace pfx {

namespace {

constexpr int kItemsWait = 2;  // of the caller's: a wait that also threads with a core of their own cause
constexpr int64_t kSoon_ns = 500'000'000;  // lost again so soon after its return: it rests longer

}  // namespace

bool ActiveThreads::try_again(int64_t now) {
    if (count_ == most_ || now < retry_at_) return false;
    if (raised_) rest_ns_ = kFirstRest_ns;  // the one before was kept: the next may follow quickly
    raised_ = true;
    raised_at_ = now;
    retry_at_ = now + rest_ns_;
    balance_ns_ = kMost_ns;
    count_++;
    changes_++;
    return true;
}

// With n threads a phase takes the caller about 1 / (n - 1) less time than with one fewer, if the
// others do as much as it does; half of that where it is bound by memory, as with one row.
void ActiveThreads::end_phase(int64_t now, int items, int own, int64_t work_ns, int64_t wait_ns) {
    if (count_ == 1 || own == 0) return;
    const int64_t others = count_ - 1, all_others = others * own;
    const int64_t gain = work_ns * std::min<int64_t>(items - own, all_others) / all_others / others / 2;
    const int64_t net = gain - std::max<int64_t>(0, wait_ns - kItemsWait * work_ns / own);
    step_gain_ns_ += net;
    add(now, net);
}

void ActiveThreads::end_step(int64_t now, int64_t lost_ns) {
    // The lost time is part of the work_ns above too. The phases' gain may have been more than the
    // balance can hold: it counts in full here.
    if (count_ > 1) {
        const int64_t cost = lost_ns + lost_ns / (count_ - 1);
        add(now, std::min<int64_t>(0, std::max<int64_t>(0, step_gain_ns_) - cost));
    }
    step_gain_ns_ = 0;
}

void ActiveThreads::add(int64_t now, int64_t gain_ns) {
    balance_ns_ = std::min(kMost_ns, balance_ns_ + gain_ns);
    if (balance_ns_ >= 0) return;
    if (raised_) {
        const bool soon = now - raised_at_ < kSoon_ns;
        rest_ns_ = soon ? std::min(2 * rest_ns_, kLongestRest_ns) : kFirstRest_ns;
    }
    raised_ = false;
    retry_at_ = now + rest_ns_;
    balance_ns_ = kMost_ns;
    count_--;
    changes_++;
}

}  // namespace pfx

// Which threads of a pool compute: pool_tests. Prints nothing; the exit status says all.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "active_threads.h"
#include "pool.h"

using pfx::ActiveThreads;
using pfx::ThreadPool;

static void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "expected: %s\n", what);
    std::exit(1);
}

constexpr int64_t kMs = 1'000'000;

static void check_choice() {
    ActiveThreads threads(2);
    int64_t now = 0, rest = ActiveThreads::kFirstRest_ns;
    for (int i = 0; i < 100; i++) threads.end_phase(now += kMs, 10, 5, kMs, kMs / 5);
    require(threads.count() == 2, "a wait of one item costs no thread");
    for (int i = 0; i < 100; i++) {  // 4 ms lost in each 10 ms of work of two
        for (int phase = 0; phase < 10; phase++) threads.end_phase(now += kMs, 10, 5, kMs, phase ? 0 : 4 * kMs);
        require(threads.count() == 2, "a thread stays that gains more than it costs");
    }
    for (int i = 0; i < 5; i++) threads.end_phase(now += kMs, 10, 9, kMs, 5 * kMs);
    require(threads.count() == 1, "a thread is lost that costs more than it gains");
    for (int i = 0; i < 12; i++) {
        require(!threads.try_again(now + rest - 1), "a lost thread rests");
        require(threads.try_again(now += rest), "a thread is tried again after its rest");
        for (int phase = 0; phase < 5; phase++) threads.end_phase(now, 10, 9, kMs, 5 * kMs);
        require(threads.count() == 1, "a thread that is tried again is lost again");
        rest = rest * 2 < ActiveThreads::kLongestRest_ns ? rest * 2 : ActiveThreads::kLongestRest_ns;
    }
    require(threads.try_again(now += rest), "a thread is tried after the longest rest");
    threads.end_step(now += 1000 * kMs, 0);
    threads.end_step(now, 11 * kMs);
    require(threads.count() == 1, "a core that the caller lost costs a thread");
    require(threads.try_again(now += ActiveThreads::kFirstRest_ns), "a thread that was kept rests for less");
    for (int phase = 0; phase < 400; phase++) threads.end_phase(now += kMs, 10, 5, kMs, 0);
    threads.end_step(now, 100 * kMs);
    require(threads.count() == 2, "a thread is kept that has gained more in a long step than the caller lost");
    threads.end_step(now, 11 * kMs);
    require(threads.count() == 1, "what a step gained counts once");
}

// A phase bound by memory takes one thread less than twice as long: the gain counts by half.
static void check_half() {
    ActiveThreads threads(2);
    int64_t now = 0;
    for (int i = 0; i < 20; i++)  // 8 ms lost in each 10 ms of work of two
        for (int phase = 0; phase < 10; phase++) threads.end_phase(now += kMs, 10, 5, kMs, phase ? 0 : 8 * kMs);
    require(threads.count() == 1, "a thread is lost that gains less than it costs where memory is the bound");
}

// Another thread of the process, as a server's, has the worker's core at the beginning of each step.
static void check_bursts() {
    ActiveThreads threads(2);
    int64_t now = 0, of_one = 0, of_two = 0;
    while (now < 200 * kMs) {  // it has the core all the time: many requests arrive
        threads.try_again(now);
        threads.end_phase(now += 5 * kMs, 10, 9, kMs, threads.count() == 2 ? 4 * kMs : 0);
    }
    while (now < 1200 * kMs) {
        threads.try_again(now);
        const bool both = threads.count() == 2;
        for (int phase = 0; phase < 20; phase++) {
            const bool late = both && phase == 0;
            threads.end_phase(now += kMs, 10, late ? 9 : 5, kMs, late ? 8 * kMs : 0);
        }
        threads.end_step(now += (both ? 8 : 20) * kMs, both ? kMs : 0);
        (both ? of_two : of_one)++;
    }
    require(of_two > 4 * of_one, "a thread is kept that gains more in a step than it costs at its beginning");
}

static void check_many() {
    ActiveThreads threads(16);
    for (int i = 0; i < 100; i++) threads.end_phase(i, 20, 2, kMs, kMs);
    require(threads.count() == 16, "waits that the division into items causes cost no thread");
    threads.end_phase(100, 160, 10, kMs, 30 * kMs);
    require(threads.count() == 15, "one thread at a time is lost");
    ActiveThreads one(1);
    one.end_phase(0, 10, 5, kMs, 100 * kMs);
    one.end_step(0, 100 * kMs);
    require(one.count() == 1 && !one.try_again(1000 * kMs), "the caller always computes");
}

// A pass whose workers hold their first item for held_ms; the items of each thread.
static std::vector<int> pass(ThreadPool& pool, int threads, int held_ms) {
    std::vector<std::atomic<int>> items(threads);
    std::atomic<bool> held{pool.num_active() == 1};
    pool.run(64, [&](int, int thread) {
        if (thread > 0 && !held.exchange(true)) usleep(held_ms * 1000);
        while (thread == 0 && !held) usleep(10);
        items[thread]++;
    });
    int sum = 0;
    for (auto& count : items) sum += count;
    require(sum == 64, "all items are complete");
    return {items.begin(), items.end()};
}

static void check_pool(int threads, int spin_us) {
    ThreadPool pool(threads, spin_us);
    pool.begin_step();
    int alone = 0;
    for (int i = 0; i < 10 && alone < 64; i++) {  // again where the rest has ended before the pass
        for (int j = 0; j < 100 && pool.num_active() > 1; j++) pass(pool, threads, 50);
        require(pool.num_active() == 1, "workers are lost that are late");
        alone = pass(pool, threads, 0)[0];
    }
    require(alone == 64, "the caller computes alone next to a worker that is late");
    for (int i = 0; i < 10'000 && alone == 64; i++) {
        usleep(1000);
        alone = pass(pool, threads, 0)[0];
    }
    require(alone < 64, "a worker computes again after its rest, in the same step");
    pool.end_step();
}

int main() {
    check_choice();
    check_half();
    check_bursts();
    check_many();
    for (int spin_us : {0, 50}) {
        check_pool(2, spin_us);
        check_pool(3, spin_us);
    }
}

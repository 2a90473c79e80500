// The threads of a forward pass.
#pragma once
#include <pthread.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "active_threads.h"

namespace pfx {

// Divides the items of one phase after another among the calling thread and its workers.
//
// Each thread begins with a contiguous share, taken from the front; a thread whose share is empty
// takes single items from the end of another's. A phase ends when all items are complete, not when
// all threads have arrived: a worker that the system runs late has taken nothing, and is not waited
// for. One that loses its core while it holds an item is: where this costs more than the last thread
// gains, fewer are active for a while, and the others sleep. A waiting thread spins for at most
// spin_us, then sleeps.
class ThreadPool {
public:
    ThreadPool(int threads, int spin_us);  // throws std::runtime_error
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_active() const { return active_threads_.count(); }  // threads that compute, now
    int64_t num_changes() const { return active_threads_.changes(); }  // of that number

    // The first item of a thread's share; of thread num_threads: their number.
    static int share_begin(int items, int thread, int num_threads) {
        return (int)((int64_t)items * thread / num_threads);
    }

    // Wakes the active workers, so that they are ready when the first phase begins.
    void begin_step();
    // Whether a thread was preempted since begin_step (a worker's may be reported a step later).
    bool end_step();

    // work(item, thread) for all items; returns when all are complete.
    template <typename Work>
    void run(int items, const Work& work) {
        const int at_once = (items + kMaxItems - 1) / kMaxItems;
        if (at_once > 1)  // not run again: that would be another template for each depth, without end
            return run_each((items + at_once - 1) / at_once, [&](int group, int thread) {
                for (int i = group * at_once; i < items && i < (group + 1) * at_once; i++) work(i, thread);
            });
        run_each(items, work);
    }

    int64_t wait_ns() const { return wait_ns_; }  // of the caller, for items of other threads

private:
    static constexpr int kMaxItems = 0xffff;  // what a share holds

    using Function = void (*)(const void* context, int item, int thread);

    template <typename Work>
    void run_each(int items, const Work& work) {
        run_all(items, [](const void* context, int item, int thread) {
            (*static_cast<const Work*>(context))(item, thread);
        }, &work);
    }

    // A thread's untaken items: phase << 32 | first << 16 | last. The phase makes the value unique.
    struct alignas(64) Share {
        std::atomic<uint64_t> range{0};
    };
    struct Worker {
        ThreadPool* pool;
        int index;
        pthread_t thread;
    };

    void wake_active();
    void start();  // throws std::runtime_error
    void stop();
    void run_all(int items, Function function, const void* context);
    void publish(int items, Function function, const void* context);
    int take(int thread);
    int take_from(Share& share, bool front);
    int work(int thread);
    void wait_for(int items);
    void worker_loop(int thread);
    bool wait_for_phase(int thread, uint32_t seen);

    const int num_threads_, spin_us_;
    std::unique_ptr<Share[]> shares_;
    std::vector<Worker> workers_;
    pid_t process_ = 0;

    // Of the current phase; written before its shares, and read by those that took an item of it.
    Function function_ = nullptr;
    const void* context_ = nullptr;

    alignas(64) std::atomic<uint32_t> phase_{0};
    std::atomic<uint32_t> step_{0};
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint32_t> completed_{0};
    std::atomic<uint32_t> caller_sleeps_{0};
    alignas(64) std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> worker_preempted_{false};

    ActiveThreads active_threads_;
    std::atomic<uint32_t> active_{0};  // their number, as the workers see it
    int64_t wait_ns_ = 0, sleep_ns_ = 0;  // of the caller; the second is part of the first
    int64_t step_begin_ = 0, cpu_begin_ = 0, sleep_begin_ = 0;
    int64_t caller_switches_ = 0;
};

int64_t now_ns();
int64_t thread_cpu_ns();  // of the calling thread

}  // namespace pfx

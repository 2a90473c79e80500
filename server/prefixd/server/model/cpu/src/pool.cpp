#include "pool.h"

#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pfx {

namespace {

constexpr int kSpinsPerClock = 16;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // waits about as long as x86's pause; yield does nothing
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

int64_t read_clock(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

int64_t involuntary_switches() {
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

uint64_t range(uint32_t phase, int first, int last) {
    return (uint64_t)phase << 32 | (uint64_t)first << 16 | (uint64_t)last;
}

// Spins until `ready` or for spin_us; whether it became ready.
template <typename Ready>
bool spin(int spin_us, const Ready& ready) {
    const int64_t end = now_ns() + (int64_t)spin_us * 1000;
    do {
        for (int i = 0; i < kSpinsPerClock; i++) {
            if (ready()) return true;
            pause();
        }
    } while (now_ns() < end);
    return ready();
}

}  // namespace

int64_t now_ns() { return read_clock(CLOCK_MONOTONIC); }

int64_t thread_cpu_ns() { return read_clock(CLOCK_THREAD_CPUTIME_ID); }

ThreadPool::ThreadPool(int threads, int spin_us)
    : num_threads_(threads), spin_us_(spin_us), shares_(new Share[threads]),
      active_threads_(threads) {
    start();
}

ThreadPool::~ThreadPool() {
    if (process_ == getpid()) stop();  // after a fork the workers are threads of the other process
}

void ThreadPool::stop() {
    stop_ = true;
    phase_++;
    futex_wake_all(phase_);
    active_ = num_threads_;
    futex_wake_all(active_);
    for (Worker& worker : workers_) pthread_join(worker.thread, nullptr);
}

void ThreadPool::start() {
    process_ = getpid();
    for (int i = 0; i < num_threads_; i++) shares_[i].range = 0;
    sleepers_ = 0;
    active_ = active_threads_.count();
    workers_.clear();
    workers_.resize(num_threads_ - 1);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    int error = 0;
    for (int i = 0; i < num_threads_ - 1 && !error; i++) {
        workers_[i] = {this, i + 1, {}};
        error = pthread_create(&workers_[i].thread, nullptr, [](void* argument) -> void* {
            Worker* worker = static_cast<Worker*>(argument);
            worker->pool->worker_loop(worker->index);
            return nullptr;
        }, &workers_[i]);
        if (error) workers_.resize(i);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!error) return;
    stop();
    throw std::runtime_error("expected to start " + std::to_string(num_threads_ - 1) +
                             " threads, the system refused: " + std::strerror(error));
}

// Inactive workers sleep until their number changes.
void ThreadPool::wake_active() {
    active_ = num_active();
    futex_wake_all(active_);
}

void ThreadPool::begin_step() {
    if (process_ != getpid()) start();
    caller_switches_ = involuntary_switches();
    step_++;
    if (num_threads_ == 1) return;
    step_begin_ = now_ns();
    cpu_begin_ = thread_cpu_ns();
    sleep_begin_ = sleep_ns_;
    if (active_threads_.try_again(step_begin_)) wake_active();
    if (num_active() > 1) publish(0, nullptr, nullptr);
}

bool ThreadPool::end_step() {
    if (num_threads_ > 1) {
        const int64_t now = now_ns(), used = thread_cpu_ns() - cpu_begin_, slept = sleep_ns_ - sleep_begin_;
        active_threads_.end_step(now, std::max<int64_t>(0, now - step_begin_ - used - slept));
        active_ = num_active();
    }
    bool preempted = worker_preempted_.exchange(false);
    return involuntary_switches() != caller_switches_ || preempted;
}

void ThreadPool::run_all(int items, Function function, const void* context) {
    const int64_t begin = num_threads_ == 1 || items <= 1 ? 0 : now_ns();
    if (begin && active_threads_.try_again(begin)) wake_active();  // a step of a long prompt is longer than a rest
    if (num_active() == 1 || items <= 1) {
        for (int i = 0; i < items; i++) function(context, i, 0);
        return;
    }
    publish(items, function, context);
    const int own = work(0);
    completed_.fetch_add(own);
    const int64_t worked = now_ns();
    if (completed_.load(std::memory_order_acquire) != (uint32_t)items) wait_for(items);
    const int64_t end = now_ns();
    active_threads_.end_phase(end, items, own, worked - begin, end - worked);
    active_ = num_active();
}

void ThreadPool::publish(int items, Function function, const void* context) {
    function_ = function;
    context_ = context;
    completed_.store(0, std::memory_order_relaxed);
    const uint32_t phase = phase_.load(std::memory_order_relaxed) + 1;
    const int active = num_active();
    for (int i = 0; i < active; i++) {
        const int first = share_begin(items, i, active), last = share_begin(items, i + 1, active);
        shares_[i].range.store(range(phase, first, last), std::memory_order_release);
    }
    phase_.store(phase);
    if (sleepers_.load() && sleepers_.exchange(0)) futex_wake_all(phase_);
}

int ThreadPool::take_from(Share& share, bool front) {
    uint64_t value = share.range.load(std::memory_order_relaxed);
    for (;;) {
        const int first = value >> 16 & 0xffff, last = value & 0xffff;
        if (first >= last) return -1;
        const uint64_t rest = range(value >> 32, front ? first + 1 : first, front ? last : last - 1);
        if (share.range.compare_exchange_weak(value, rest, std::memory_order_acquire,
                                              std::memory_order_relaxed))
            return front ? first : last - 1;
    }
}

int ThreadPool::take(int thread) {
    int item = take_from(shares_[thread], true);
    for (int i = 1; i < num_threads_ && item < 0; i++)
        item = take_from(shares_[(thread + i) % num_threads_], false);
    return item;
}

// Works until no item is left; the number of items. The phase cannot end before they are counted.
int ThreadPool::work(int thread) {
    int count = 0;
    for (int item; (item = take(thread)) >= 0; count++) function_(context_, item, thread);
    return count;
}

void ThreadPool::wait_for(int items) {
    const int64_t begin = now_ns();
    auto complete = [&] { return completed_.load(std::memory_order_acquire) == (uint32_t)items; };
    if (!spin(spin_us_, complete)) {
        const int64_t asleep = now_ns();
        caller_sleeps_ = 1;
        for (uint32_t now; (now = completed_.load()) != (uint32_t)items;) futex_wait(completed_, now);
        caller_sleeps_ = 0;
        sleep_ns_ += now_ns() - asleep;
    }
    wait_ns_ += now_ns() - begin;
}

bool ThreadPool::wait_for_phase(int thread, uint32_t seen) {
    auto ready = [&] { return phase_.load(std::memory_order_acquire) != seen; };
    if (active_.load(std::memory_order_relaxed) > (uint32_t)thread && spin(spin_us_, ready)) return !stop_;
    for (;;) {
        const uint32_t active = active_.load();
        if (active <= (uint32_t)thread) {
            futex_wait(active_, active);
        } else if (ready()) {
            return !stop_;
        } else {
            sleepers_++;
            futex_wait(phase_, seen);
        }
    }
}

void ThreadPool::worker_loop(int thread) {
    char name[16];
    std::snprintf(name, sizeof name, "pfx-%d", thread);
    pthread_setname_np(pthread_self(), name);
    uint32_t step = 0, seen = 0;
    int64_t switches = involuntary_switches();
    while (wait_for_phase(thread, seen)) {
        seen = phase_.load(std::memory_order_acquire);
        if (step != step_.load(std::memory_order_relaxed)) {
            step = step_.load(std::memory_order_relaxed);
            int64_t now = involuntary_switches();
            if (now != switches) worker_preempted_ = true;
            switches = now;
        }
        int count = work(thread);
        if (count == 0) continue;
        completed_.fetch_add(count);
        if (caller_sleeps_.load()) futex_wake_all(completed_);
    }
}

}  // namespace pfx

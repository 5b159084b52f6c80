// One real thread per CUDA thread; part of cuda_host_engine.h.
#pragma once

namespace emu {

inline Block& block() {
    static Block the_block;
    return the_block;
}

inline thread_local Thread* running_thread;
inline Thread& self() { return *running_thread; }

inline std::atomic<unsigned> awake;  // relaxed: counting must not order the threads' memory

inline void sleep(Room& room, Lock& lock) {
    Thread& me = self();
    if (!me.waiting) return;
    if (awake.fetch_sub(1, std::memory_order_relaxed) == 1) fail_stuck();
    room.changed.wait(lock, [&me] { return !me.waiting; });
}

inline void wake(Room& room, Thread& thread) {
    thread.waiting = false;
    if (&thread == running_thread) return;
    awake.fetch_add(1, std::memory_order_relaxed);
    room.changed.notify_all();
}

inline void run_threads(const std::function<void()>& body, int order, std::mt19937& random) {
    std::vector<unsigned> numbers = first_numbers(count(block().threads_shape));
    arrange(numbers, order, random);
    awake = static_cast<unsigned>(numbers.size());
    std::atomic<unsigned> left = awake.load();
    std::vector<std::thread> threads;
    for (const unsigned number : numbers) {
        threads.emplace_back([&, number] {
            running_thread = &block().threads[number];
            body();
            leave(self());
            const bool last = left.fetch_sub(1, std::memory_order_relaxed) == 1;
            if (awake.fetch_sub(1, std::memory_order_relaxed) == 1 && !last) fail_stuck();
        });
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace emu

// One fiber per CUDA thread; part of cuda_host_engine.h. A fiber is started once through ucontext; from then on setjmp
// switches, which costs no system call.
#pragma once

namespace emu {

inline Block& block() {
    static thread_local Block the_block;
    return the_block;
}

struct Fiber {
    static constexpr std::size_t STACK = 256 << 10;  // bytes, of which the system gives only those that are used
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    jmp_buf here;
};

struct Scheduler {
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept for the next launch
    ucontext_t start;
    jmp_buf here;
    unsigned running;
    const std::function<void()>* body;
};

inline Scheduler& scheduler() {
    static thread_local Scheduler the_scheduler;
    return the_scheduler;
}

inline Thread& self() { return block().threads[scheduler().running]; }

__attribute__((noinline)) inline void switch_to(jmp_buf& from, jmp_buf& to) {
    if (_setjmp(from) == 0) _longjmp(to, 1);
}

inline void fiber_main() {
    Scheduler& all = scheduler();
    Fiber& me = *all.fibers[all.running];
    if (_setjmp(me.here) == 0) swapcontext(&me.start, &all.start);
    for (;;) {  // once per block
        (*all.body)();
        leave(self());
        switch_to(me.here, all.here);
    }
}

inline void sleep(Room&, Lock&) {
    Scheduler& all = scheduler();
    if (self().waiting) switch_to(all.fibers[all.running]->here, all.here);
}

inline void wake(Room&, Thread& thread) { thread.waiting = false; }

inline void start_fibers(unsigned wanted) {
    Scheduler& all = scheduler();
    for (all.running = static_cast<unsigned>(all.fibers.size()); all.running < wanted; all.running++) {
        all.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *all.fibers.back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = Fiber::STACK;
        makecontext(&fiber.start, fiber_main, 0);
        swapcontext(&all.start, &fiber.start);
    }
}

inline void run_threads(const std::function<void()>& body, int order, std::mt19937& random) {
    Scheduler& all = scheduler();
    std::vector<unsigned> numbers = first_numbers(count(block().threads_shape));
    start_fibers(static_cast<unsigned>(numbers.size()));
    all.body = &body;
    if (order == 1) arrange(numbers, order, random);
    while (block().live > 0) {
        if (order > 1) arrange(numbers, order, random);
        bool any_ran = false;
        for (const unsigned number : numbers) {
            const Thread& thread = block().threads[number];
            if (thread.waiting || thread.finished) continue;
            any_ran = true;
            all.running = number;
            switch_to(all.here, all.fibers[number]->here);
        }
        if (!any_ran) fail_stuck();
    }
}

}  // namespace emu

//! A persistent pool of threads that spin briefly and then park.
//!
//! One call of [`Pool::run`] costs about a microsecond when the workers are still spinning from
//! the last one, which is what a decode step of a small model (a few hundred calls) needs; it takes
//! no lock, allocates nothing and, while the workers spin, makes no system call. Tasks are handed
//! out one by one, so a thread that the operating system takes away delays the one task it holds and
//! not a share of the work; and a thread that has not come yet is not waited for. Results cannot
//! depend on who computes what because a task computes the same thing on any thread.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Rounds of `spin_loop` before a waiting thread gives up its processor: some tens of microseconds,
/// longer than the gaps between the operations of one token and far shorter than a scheduler's time
/// slice.
const SPINS: usize = 8_000;

/// The work of one `run`, on the stack of its caller.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
}

/// Low half of [`Shared::state`]: the next task. All ones: no task can be taken.
const CLOSED: u64 = u32::MAX as u64;

struct Shared {
    /// Number of the job in the high half, next task to hand out in the low half: a task is taken by
    /// one compare-and-swap, which fails if another job has begun.
    state: AtomicU64,
    /// Valid for a thread that holds a task of the current job, and no longer.
    job: AtomicPtr<Job<'static>>,
    tasks: AtomicUsize,
    /// Tasks that are finished. `run` returns when all are, which is what keeps `job` alive for
    /// those who hold one.
    done: AtomicUsize,
    /// A task has panicked: the others are handed out but not run.
    panicked: AtomicBool,
    /// The panic, to be raised again by the caller.
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    stop: AtomicBool,
}

struct Worker {
    thread: Thread,
    parked: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A fixed set of threads that run tasks `0..n` of one closure at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Set while a job runs: concurrent callers take turns.
    turn: AtomicBool,
}

thread_local! {
    /// Set while this thread executes tasks: a nested `run` is then executed in place.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads, the calling one included (at least one).
    ///
    /// # Panics
    /// If the operating system refuses to start a thread.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: AtomicPtr::new(std::ptr::null_mut()),
            tasks: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .map(|i| {
                let parked = Arc::new(AtomicBool::new(false));
                let (s, p) = (Arc::clone(&shared), Arc::clone(&parked));
                let handle = std::thread::Builder::new()
                    .name(format!("gptq-{i}"))
                    .spawn(move || work(&s, &p))
                    // The system refuses a thread only when it is out of memory or process slots.
                    .expect("the operating system can start a thread");
                Worker { thread: handle.thread().clone(), parked, handle: Some(handle) }
            })
            .collect();
        Self { shared, workers, turn: AtomicBool::new(false) }
    }

    /// A pool with one thread per core that this process may use.
    pub fn with_all_cores() -> Self {
        Self::new(physical_cores())
    }

    /// Number of threads, the calling one included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)`, …, `task(tasks - 1)`, each exactly once, spread over the threads, and
    /// returns when all are done. A nested call runs its tasks on the current thread.
    ///
    /// # Panics
    /// Raises the first panic of a task again, after all threads have stopped.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() || tasks as u64 >= CLOSED {
            (0..tasks).for_each(task);
            return;
        }
        let mut spins = 0;
        while self.turn.swap(true, Ordering::Acquire) {
            wait(&mut spins);
        }
        let shared = &*self.shared;
        let job = Job { task };
        // Nobody takes a task of the old number any more, so that a late thread cannot combine it
        // with the new job.
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        shared.state.store(number | CLOSED, Ordering::SeqCst);
        shared.job.store(std::ptr::from_ref(&job).cast_mut().cast(), Ordering::Relaxed);
        // Who sees the new number of tasks also sees that the old job is closed.
        shared.tasks.store(tasks, Ordering::Release);
        shared.done.store(0, Ordering::Relaxed);
        shared.state.store(number, Ordering::SeqCst);
        for w in &self.workers {
            if w.parked.load(Ordering::SeqCst) {
                w.thread.unpark();
            }
        }
        execute(shared, number);
        let mut spins = 0;
        while shared.done.load(Ordering::Acquire) != tasks {
            wait(&mut spins);
        }
        let panic = shared
            .panicked
            .swap(false, Ordering::Relaxed)
            .then(|| shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.turn.store(false, Ordering::Release);
        if let Some(Some(payload)) = panic {
            resume_unwind(payload);
        }
    }

    /// As [`Pool::run`] with tasks that can fail.
    ///
    /// # Errors
    /// That of the first task that fails, after all have been run.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub fn try_run<E: Send>(
        &self,
        tasks: usize,
        task: &(dyn Fn(usize) -> Result<(), E> + Sync),
    ) -> Result<(), E> {
        let failed = Mutex::new(None);
        self.run(tasks, &|index| {
            if let Err(error) = task(index) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|&(earlier, _)| index < earlier) {
                    *failed = Some((index, error));
                }
            }
        });
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.state.fetch_add(1 << 32, Ordering::SeqCst);
        for w in &mut self.workers {
            w.thread.unpark();
            if let Some(handle) = w.handle.take() {
                // A worker catches the panics of its tasks, so joining cannot fail.
                let _ = handle.join();
            }
        }
    }
}

/// Cores that this process may use, hyper-threads counted once: two of them share the units that
/// the kernels keep busy.
pub fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let siblings = |cpu: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    };
    let mut cores: Vec<String> = (0..).map_while(siblings).collect();
    let processors = cores.len();
    cores.sort_unstable();
    cores.dedup();
    // With a part of the processors, it is not known which ones: as many threads per core as anywhere.
    match processors {
        0 => allowed,
        _ => (allowed * cores.len()).div_ceil(processors).clamp(1, allowed),
    }
}

/// One round of waiting: on the processor at first, then giving it to others.
fn wait(spins: &mut usize) {
    *spins += 1;
    if *spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

/// Takes and runs tasks of job `number` (in the high half) until there are none.
fn execute(shared: &Shared, number: u64) {
    loop {
        let state = shared.state.load(Ordering::Acquire);
        let next = state & CLOSED;
        if state & !CLOSED != number || next as usize >= shared.tasks.load(Ordering::Acquire) {
            return;
        }
        let taken =
            shared.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
        if taken.is_err() {
            continue;
        }
        if !shared.panicked.load(Ordering::Relaxed) {
            // SAFETY: this thread holds a task of the current job (the exchange would have failed
            // otherwise), and `run` does not return before it is counted as done.
            let job = unsafe { &*shared.job.load(Ordering::Relaxed) };
            INSIDE.set(true);
            let result = catch_unwind(AssertUnwindSafe(|| (job.task)(next as usize)));
            INSIDE.set(false);
            if let Err(payload) = result {
                // The first panic wins.
                let mut first = shared.panic.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(payload);
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.done.fetch_add(1, Ordering::Release);
    }
}

fn work(shared: &Shared, parked: &AtomicBool) {
    let mut seen = 0;
    let stopped = || shared.stop.load(Ordering::SeqCst);
    // The number of a job that this thread has not seen, once its tasks are open.
    let fresh = |seen: u64| {
        let state = shared.state.load(Ordering::SeqCst);
        let number = state & !CLOSED;
        (number != seen && state != number | CLOSED).then_some(number)
    };
    while !stopped() {
        let mut spins = 0;
        let mut number = None;
        while number.is_none() && !stopped() {
            number = fresh(seen);
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else if number.is_none() {
                parked.store(true, Ordering::SeqCst);
                while fresh(seen).is_none() && !stopped() {
                    std::thread::park();
                }
                parked.store(false, Ordering::SeqCst);
            }
        }
        if let Some(number) = number {
            seen = number;
            execute(shared, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn nested_runs_and_sleeping_workers() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            pool.run(4, &|_| {
                pool.run(5, &|_| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
            });
        }
        assert_eq!(total.load(Ordering::Relaxed), 60);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i| assert!(i != 5, "five"));
        }));
        assert!(caught.is_err());
        let total = AtomicUsize::new(0);
        pool.run(8, &|_| {
            total.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(total.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn callers_take_turns_and_jobs_do_not_mix() {
        let pool = Pool::new(3);
        std::thread::scope(|scope| {
            for caller in 0..4usize {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..500 {
                        let tasks = 2 + (caller + round) % 7;
                        let sum = AtomicUsize::new(0);
                        pool.run(tasks, &|i| {
                            sum.fetch_add(i + 1, Ordering::Relaxed);
                        });
                        assert_eq!(sum.load(Ordering::Relaxed), tasks * (tasks + 1) / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn cores_are_at_most_the_processors() {
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        assert!((1..=allowed).contains(&physical_cores()));
    }
}

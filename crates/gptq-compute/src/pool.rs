//! A persistent pool of threads that spin briefly and then park.
//!
//! One call of [`Pool::run`] costs about a microsecond when the workers are still spinning from
//! the last one, which is what a decode step of a small model (a few hundred calls) needs. Tasks
//! are handed out by a shared counter, so a thread that the operating system takes away delays one
//! task and not a fixed share of the work; results cannot depend on it because a task computes the
//! same thing on any thread.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Rounds of `spin_loop` before a worker goes to sleep: some tens of microseconds, longer than
/// the gaps between the operations of one token and far shorter than a scheduler's time slice.
const SPINS: usize = 8_000;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// The work of one `run`, as workers see it.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    tasks: usize,
}

struct Shared {
    job: Mutex<Option<Job>>,
    /// Raised once per `run`; workers wait for it to change.
    epoch: AtomicUsize,
    /// Next task to hand out.
    next: AtomicUsize,
    /// Workers that have not finished the current job.
    busy: AtomicUsize,
    /// The panic of a task, to be raised again by the caller.
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: the raw pointer in `Job` is dereferenced only by workers between the start and the end
// of the `run` call that owns the closure.
unsafe impl Send for Shared {}
// SAFETY: as above; all other fields are synchronised.
unsafe impl Sync for Shared {}

struct Worker {
    thread: Thread,
    parked: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A fixed set of threads that run tasks `0..n` of one closure at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Held while a job runs: concurrent callers take turns.
    turn: Mutex<()>,
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
            job: Mutex::new(None),
            epoch: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
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
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// A pool with one thread per processor that this process may use.
    pub fn with_all_cores() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from))
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
        if tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            (0..tasks).for_each(task);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `run` does not return before every worker is done
        // with the pointer.
        let task: *const Task<'static> =
            unsafe { std::mem::transmute::<&Task<'_>, &Task<'static>>(task) };
        let job = Job { task, tasks };
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for w in &self.workers {
            if w.parked.load(Ordering::SeqCst) {
                w.thread.unpark();
            }
        }
        execute(shared, job);
        let mut spins = 0;
        while shared.busy.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        drop(turn);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for w in &mut self.workers {
            w.thread.unpark();
            if let Some(handle) = w.handle.take() {
                // A worker catches the panics of its tasks, so joining cannot fail.
                let _ = handle.join();
            }
        }
    }
}

fn execute(shared: &Shared, job: Job) {
    INSIDE.set(true);
    // SAFETY: the closure outlives the job, see `Pool::run`.
    let task = unsafe { &*job.task };
    let result = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let i = shared.next.fetch_add(1, Ordering::Relaxed);
            if i >= job.tasks {
                break;
            }
            task(i);
        }
    }));
    INSIDE.set(false);
    if let Err(payload) = result {
        // Stop handing out tasks; the first panic wins.
        shared.next.store(job.tasks, Ordering::Relaxed);
        shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
    }
}

fn work(shared: &Shared, parked: &AtomicBool) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                parked.store(true, Ordering::SeqCst);
                while shared.epoch.load(Ordering::SeqCst) == seen {
                    std::thread::park();
                }
                parked.store(false, Ordering::SeqCst);
            }
        }
        seen = shared.epoch.load(Ordering::Acquire);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let job = *shared.job.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = job {
            execute(shared, job);
        }
        shared.busy.fetch_sub(1, Ordering::Release);
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
}

//! Memory for keys and values. What the layers of a sequence take lies together and grows with it, on
//! huge pages where the system gives them: a step of decoding reads all of it, and small pages cost it
//! a fifth of its time in translations of addresses.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::slice;
use std::sync::{Arc, Mutex, PoisonError};

use crate::arena::{Arena, HUGE, LINE};

/// The largest piece of several blocks.
const MOST: usize = 4 * HUGE;

/// Memory that the caches of one sequence share.
#[derive(Debug, Clone, Default)]
pub struct KvMemory(Arc<Mutex<Pieces>>);

#[derive(Debug, Default)]
struct Pieces {
    /// The newest, of which `used` bytes are taken.
    last: Option<Arc<Arena>>,
    used: usize,
    /// Bytes of all pieces.
    total: usize,
}

impl KvMemory {
    /// Bytes that may be resident beyond those in use: a huge page is so as a whole.
    pub const SLACK: usize = HUGE;

    /// Zeroed words that nobody else has.
    pub(super) fn take(&self, words: usize) -> Words {
        let bytes = (words * size_of::<u32>()).next_multiple_of(LINE);
        let mut pieces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = pieces.last.as_ref().filter(|a| a.len() - pieces.used >= bytes).cloned();
        let arena = last.unwrap_or_else(|| {
            // As much again as there is, so that short sequences stay small; whole blocks, as a rest
            // would be lost.
            let size = bytes * pieces.total.min(MOST).div_ceil(bytes).max(1);
            let arena = Arc::new(Arena::zeroed(size));
            pieces.total += size;
            (pieces.last, pieces.used) = (Some(Arc::clone(&arena)), 0);
            arena
        });
        let start = pieces.used;
        pieces.used += bytes;
        Words { arena, start, len: words }
    }
}

/// A part of a piece of memory. The arena is never borrowed as a whole: its parts are written beside each
/// other.
pub(super) struct Words {
    arena: Arc<Arena>,
    /// Byte.
    start: usize,
    len: usize,
}

impl Words {
    fn ptr(&self) -> *mut u32 {
        self.arena.ptr().wrapping_add(self.start).cast()
    }
}

impl Deref for Words {
    type Target = [u32];
    fn deref(&self) -> &[u32] {
        // SAFETY: the arena lives as long as `self`; these bytes are initialised, aligned to a line, and
        // were handed out once, so that nobody writes them while `self` is borrowed.
        unsafe { slice::from_raw_parts(self.ptr(), self.len) }
    }
}

impl DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { slice::from_raw_parts_mut(self.ptr(), self.len) }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Words[{}]", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeroed_apart_and_outlive_their_memory() {
        let memory = KvMemory::default();
        let mut parts: Vec<Words> = (0..300).map(|i| memory.take(1 + 97 * i)).collect();
        drop(memory);
        for (i, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.len(), 1 + 97 * i);
            assert!(part.iter().all(|w| *w == 0));
            part.fill(i as u32);
        }
        for (i, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|w| *w == i as u32));
            assert_eq!(part.ptr().addr() % LINE, 0);
        }
    }

    #[test]
    fn pieces_grow_with_what_was_taken() {
        for words in [16, 4096, 320 << 10, 1 << 20] {
            let memory = KvMemory::default();
            for taken in (1..50).map(|blocks| blocks * words * size_of::<u32>()) {
                drop(memory.take(words));
                let total = memory.0.lock().unwrap().total;
                assert!(
                    total <= 2 * taken && total < taken + MOST + 4 * words,
                    "{total} for {taken}"
                );
            }
        }
    }
}

//! Memory for weights, keys and values: aligned to cache lines, on huge pages where the system gives them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Size of a huge page on the systems that have them.
pub(crate) const HUGE: usize = 2 << 20;
/// Size of a cache line.
pub(crate) const LINE: usize = 64;

/// Zeroed bytes that never move.
pub(crate) struct Arena {
    /// What the allocator gave, with room to align.
    whole: NonNull<u8>,
    layout: Layout,
    /// Where the bytes begin.
    start: usize,
    len: usize,
}

// SAFETY: an arena owns its bytes like a boxed slice.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    pub(crate) fn zeroed(len: usize) -> Self {
        let align = if len < HUGE { LINE } else { HUGE };
        // Not aligned by the allocator, which would then write the zeros itself instead of taking
        // untouched pages, and all before the advice.
        let layout = Layout::array::<u8>(len + align).expect("less than the address space");
        // SAFETY: the size is not zero.
        let whole = unsafe { alloc_zeroed(layout) };
        let Some(whole) = NonNull::new(whole) else { handle_alloc_error(layout) };
        let start = whole.as_ptr().addr().wrapping_neg() % align;
        advise(whole.as_ptr().wrapping_add(start), len / HUGE * HUGE);
        Self { whole, layout, start, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first byte. Who writes through it must know that nobody else has these bytes.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.whole.as_ptr().wrapping_add(self.start)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `start + len` initialised bytes were allocated and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len) }
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena[{}]", self.len)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.whole.as_ptr(), self.layout) };
    }
}

/// Asks for huge pages in a range that is made of whole ones.
#[cfg(target_os = "linux")]
fn advise(ptr: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: whole pages inside the buffer; the advice changes no contents. Where the system
        // does not follow it, nothing is lost.
        unsafe { libc::madvise(ptr.cast(), len, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: *mut u8, _: usize) {}

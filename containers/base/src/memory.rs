//! Gives memory back to the system when most of those who needed it have gone.

/// Fewer connections than this leave nothing that is worth looking for.
const CROWD: u32 = 1024;

/// The most connections that there were since memory was given back.
#[derive(Default)]
pub struct Crowd {
    most: u32,
}

impl Crowd {
    /// To be told now and then how many connections are open. The C library keeps what was freed between what is in
    /// use, and would until the process ends.
    pub fn is_now(&mut self, open: u32) {
        if self.has_left(open) {
            give_back();
        }
    }

    fn has_left(&mut self, open: u32) -> bool {
        let left = self.most >= CROWD && open <= self.most / 4;
        self.most = if left { open } else { self.most.max(open) };
        left
    }
}

#[cfg(target_env = "gnu")]
fn give_back() {
    // SAFETY: it may be called by any thread at any time, and leaves alone what is in use.
    unsafe { nix::libc::malloc_trim(0) };
}

/// Others have no such call, and may not need it.
#[cfg(not(target_env = "gnu"))]
fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_leaves_once() {
        let mut crowd = Crowd::default();
        let left = [0, CROWD - 1, 0, CROWD, CROWD / 2, CROWD / 4, 1, 0, 4 * CROWD, CROWD - 1, 1]
            .map(|open| crowd.has_left(open));
        let expected = [false, false, false, false, false, true, false, false, false, true, false];
        assert_eq!(left, expected);
    }
}

//! What a stack owned while it ran, and the assertion that the kernel has none of it any more.
use crate::{bpf::Objects, eventually};

/// Everything of the kernel's that the product's processes were seen to hold.
#[derive(Default)]
pub struct Seen {
    objects: Objects,
}

impl Seen {
    /// Remembers what a process holds now; call it before the process ends.
    pub fn look(&mut self, pid: i32) -> Objects {
        let now = Objects::of_process(pid);
        self.objects.programs.extend(&now.programs);
        self.objects.maps.extend(&now.maps);
        self.objects.links.extend(&now.links);
        now
    }

    /// Which of it the kernel still has, each with its kind.
    pub fn alive(&self) -> Vec<String> {
        self.objects.alive()
    }

    pub fn assert_gone(&self) {
        // The kernel frees programs and maps after a grace period.
        let mut alive = Vec::new();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("BPF objects to be freed", || {
                alive = self.objects.alive();
                alive.is_empty().then_some(())
            });
        }));
        assert!(outcome.is_ok(), "BPF objects are left behind: {alive:?}");
    }
}

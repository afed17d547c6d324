//! The BPF programs: enrolment and retirement, the verdict, and the accept hook that hands it over.
#![no_std]
#![no_main]

mod accept;
mod enrol;
mod exact;
mod maps;
mod scan;
mod verdict;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The verifier admits some helpers to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

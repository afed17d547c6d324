//! The resize function.
fn main() {}

//! The refusal function.
fn main() {}

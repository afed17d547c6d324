//! What shows a running gateway to a person.
mod figures;
mod frame;
pub mod status;
pub mod top;

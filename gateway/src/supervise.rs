//! The parent of the functions (in work).

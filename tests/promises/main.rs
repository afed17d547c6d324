//! One file per promise that the product makes.
mod mangling;

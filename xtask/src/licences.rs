//! `cargo xtask licences`: no dependency takes away what `MIT OR Apache-2.0` gives.

use std::process::ExitCode;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::workspace;

/// Licences that ask for no more than to be named with the program.
const PERMISSIVE: [&str; 11] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

pub fn run() -> Result<ExitCode> {
    let metadata = workspace::metadata(&[])?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut refused = 0;
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none named");
        if !is_permissive(licence) {
            refused += 1;
            println!("{} {}: {licence}", text(package, "name"), text(package, "version"));
        }
    }
    if refused > 0 {
        println!(
            "{refused} of {} packages have a licence that is not known to be permissive",
            packages.len()
        );
        return Ok(ExitCode::FAILURE);
    }
    println!("the licences of all {} packages are permissive", packages.len());
    Ok(ExitCode::SUCCESS)
}

fn text<'a>(package: &'a Value, key: &str) -> &'a str {
    package[key].as_str().unwrap_or("?")
}

/// Whether an SPDX expression can be satisfied by permissive licences alone. `/` is crates.io's old way to say OR.
fn is_permissive(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    let tokens: Vec<String> =
        expression.replace('(', " ( ").replace(')', " ) ").split_whitespace().map(str::to_owned).collect();
    let mut rest = tokens.as_slice();
    let value = any_of(&mut rest);
    value == Some(true) && rest.is_empty()
}

fn any_of(rest: &mut &[String]) -> Option<bool> {
    let mut value = all_of(rest)?;
    while take(rest, "OR") {
        value |= all_of(rest)?;
    }
    Some(value)
}

fn all_of(rest: &mut &[String]) -> Option<bool> {
    let mut value = one(rest)?;
    while take(rest, "AND") {
        value &= one(rest)?;
    }
    Some(value)
}

fn one(rest: &mut &[String]) -> Option<bool> {
    if take(rest, "(") {
        let value = any_of(rest)?;
        return take(rest, ")").then_some(value);
    }
    let (licence, after) = rest.split_first()?;
    *rest = after;
    let mut licence = licence.clone();
    if take(rest, "WITH") {
        let (exception, after) = rest.split_first()?;
        *rest = after;
        licence = format!("{licence} WITH {exception}");
    }
    Some(PERMISSIVE.contains(&licence.as_str()))
}

fn take(rest: &mut &[String], token: &str) -> bool {
    match rest.split_first() {
        Some((first, after)) if first == token => {
            *rest = after;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_permissive_choice_is_enough_and_every_part_counts() {
        for allowed in [
            "MIT",
            "MIT/Apache-2.0",
            "MIT OR GPL-2.0-only",
            "Unlicense OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT",
            "MIT AND (GPL-2.0-only OR BSD-3-Clause)",
        ] {
            assert!(is_permissive(allowed), "{allowed}");
        }
        for refused in [
            "none named",
            "",
            "GPL-2.0-only",
            "MIT AND GPL-2.0-only",
            "(MIT",
            "MIT)",
            "MIT OR",
            "MIT MIT",
            "Apache-2.0 WITH",
            "Apache-2.0 WITH other-exception",
            "AGPL-3.0-only OR (MIT AND LGPL-3.0-only)",
        ] {
            assert!(!is_permissive(refused), "{refused}");
        }
    }
}

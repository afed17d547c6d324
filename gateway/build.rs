//! Compiles the BPF programs of `gateway-ebpf` into `$OUT_DIR/gateway-ebpf`.

use std::hash::{DefaultHasher, Hasher as _};
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, bail};

/// Where `cargo xtask setup` puts the toolchain; xtask/src/toolchain.rs has the same path.
const TOOLCHAIN: &str = "pointsman/ebpf-1/current";

fn main() -> Result<()> {
    let link = cache()?.join(TOOLCHAIN);
    println!("cargo:rerun-if-env-changed=XDG_CACHE_HOME");
    println!("cargo:rerun-if-changed={}", link.join("identity").display());
    let Ok(toolchain) = fs::canonicalize(&link) else {
        bail!("the eBPF toolchain is not set up ({} is missing): run `cargo xtask setup`", link.display());
    };
    for part in ["bin/rustc", "bin/cargo", "bin/bpf-linker", "lib/libLLVM.so"] {
        if !toolchain.join(part).exists() {
            bail!("the eBPF toolchain in {} lacks {part}: run `cargo xtask setup`", toolchain.display());
        }
    }
    let bootstrap =
        fs::read_to_string(toolchain.join("bootstrap")).context("the eBPF toolchain's `bootstrap`")?;
    let mut path = vec![toolchain.join("bin")];
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    // SAFETY: this program has a single thread, so nobody reads the environment meanwhile.
    unsafe {
        // What aya-build relays would appear as warnings; errors and real warnings still do.
        env::set_var("CARGO_TERM_QUIET", "true");
        env::set_var("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", toolchain.join("bin/bpf-linker"));
        // Without rustup, aya-build takes cargo and rustc from here.
        env::set_var("PATH", env::join_paths(path)?);
        // aya-ebpf uses a feature that only nightly compilers, or those told so, have.
        match bootstrap.trim() {
            "" => env::remove_var("RUSTC_BOOTSTRAP"),
            crates => env::set_var("RUSTC_BOOTSTRAP", crates),
        }
        // Meant for the host's crates only.
        for variable in ["RUSTC_WRAPPER", "CARGO_BUILD_RUSTC_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
            env::remove_var(variable);
        }
    }
    println!("cargo:rerun-if-changed=common");
    let root_dir = env::var("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR")? + "/../gateway-ebpf";
    let toolchain = toolchain.to_str().context("the cache directory's path is not UTF-8")?;
    aya_build::build_ebpf(
        [aya_build::Package { name: "gateway-ebpf", root_dir: &root_dir, ..Default::default() }],
        aya_build::Toolchain::Custom(toolchain),
    )?;
    println!("cargo:rustc-env=POINTSMAN_OBJECT_ID={:016x}", object_id()?);
    Ok(())
}

/// Tells objects apart on one machine, between two boots; nobody gains by making two that are equal.
fn object_id() -> Result<u64> {
    let object = Path::new(&env::var_os("OUT_DIR").context("OUT_DIR")?).join("gateway-ebpf");
    let mut hasher = DefaultHasher::new();
    hasher.write(&fs::read(&object).with_context(|| object.display().to_string())?);
    Ok(hasher.finish())
}

fn cache() -> Result<PathBuf> {
    match env::var_os("XDG_CACHE_HOME") {
        Some(base) if Path::new(&base).is_absolute() => Ok(base.into()),
        _ => Ok(PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache")),
    }
}

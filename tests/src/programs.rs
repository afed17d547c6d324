//! Where the programs are that the tests run: the product's own and other people's clients.
use std::path::PathBuf;

/// A built program of this workspace.
///
/// They lie beside the test executables unless `POINTSMAN_BIN_DIR` says where.
pub fn product(name: &str) -> PathBuf {
    let folder = std::env::var_os("POINTSMAN_BIN_DIR").map_or_else(beside_the_tests, PathBuf::from);
    let path = folder.join(name);
    assert!(
        path.is_file(),
        "{} is not built. `cargo test -p tests` alone does not build the programs that it runs: \
         use `cargo xtask test`, or run `cargo build` first",
        path.display()
    );
    path
}

/// Test executables are in `target/PROFILE/deps`, programs in `target/PROFILE`.
fn beside_the_tests() -> PathBuf {
    let own = std::env::current_exe().expect("the test's own path");
    let deps = own.parent().expect("an executable lies in a folder");
    deps.parent().expect("a deps folder lies in a profile's").to_path_buf()
}

/// A client from the distribution; a missing one fails the test, because a skipped test looks like a passed one.
pub fn client(name: &str, package: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    // Debian keeps some of them where only root looks.
    let folders = path.split(':').chain(["/usr/sbin", "/sbin"]).map(PathBuf::from);
    let found = folders.map(|folder| folder.join(name)).find(|candidate| candidate.is_file());
    found.unwrap_or_else(|| panic!("this test needs {name}: apt-get install {package}"))
}

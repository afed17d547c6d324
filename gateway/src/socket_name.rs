//! The names of instances' sockets, `NAME.sock` and `NAME@ID.sock`.
use common::FunctionName;

const SUFFIX: &str = ".sock";

/// Which instance of which function listens at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketName<'a> {
    pub function: FunctionName,
    pub id: Option<&'a str>,
}

impl<'a> SocketName<'a> {
    /// `None` for a file that is no instance's socket.
    pub fn parse(file: &'a str) -> Option<Self> {
        let instance = file.strip_suffix(SUFFIX)?;
        let (name, id) = match instance.split_once('@') {
            Some((_, "")) => return None,
            Some((name, id)) => (name, Some(id)),
            None => (instance, None),
        };
        Some(Self { function: name.parse().ok()?, id })
    }
}

/// The socket of an instance that goes by this label, `NAME` or `NAME@ID`.
pub fn of_label(label: &str) -> String {
    format!("{label}{SUFFIX}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sockets_name_functions() {
        let function: FunctionName = "echo".parse().unwrap();
        for (file, id) in [("echo.sock", None), ("echo@1.sock", Some("1")), ("echo@a@b.sock", Some("a@b"))] {
            assert_eq!(SocketName::parse(file), Some(SocketName { function, id }), "{file}");
        }
        for file in ["echo@.sock", "@1.sock", ".sock", "Echo.sock", "echo.socket", "echo"] {
            assert_eq!(SocketName::parse(file), None, "{file}");
        }
        assert_eq!(of_label("echo@1"), "echo@1.sock");
    }
}

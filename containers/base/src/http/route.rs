//! Whose request a head is: the one decision that keeps a connection here or lets it go.
use common::{
    FunctionName, Protocol,
    target::{self, Target},
};

use super::hosts::Hosts;

/// Who this function is to its clients.
#[derive(Clone, Debug)]
pub struct Identity {
    pub name: FunctionName,
    pub hosts: Hosts,
}

/// What a request's target and Host decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// This function's; its part of the target begins at `path`.
    Own { path: usize },
    /// Another function's, by its path or because the connection came from there.
    Foreign(FunctionName),
    /// Nobody's.
    NotFound,
    /// Another function's, by its Host.
    Misdirected,
    /// No target that a request can have.
    Malformed,
}

impl Identity {
    /// The connection's protocol decides whom a target without a function belongs to: under TLS the client asked for
    /// the function `home` by its host name, in the clear it asked for nobody.
    pub fn route(
        &self,
        protocol: Protocol,
        home: &FunctionName,
        target: &[u8],
        host: Option<&[u8]>,
    ) -> Route {
        match target::classify(target) {
            Target::Function { name, end } if name == self.name => Route::Own { path: end },
            Target::Function { name, .. } => Route::Foreign(name),
            Target::NotFound => Route::NotFound,
            Target::Malformed => Route::Malformed,
            Target::Other if protocol == Protocol::Http => Route::NotFound,
            // Whose host it is, is the function's to say for which the client came.
            Target::Other if *home != self.name => Route::Foreign(*home),
            // RFC 9112 §3.2.2: the target's authority wins over Host.
            Target::Other
                if target::authority(target).or(host).is_some_and(|host| self.hosts.is_others(host)) =>
            {
                Route::Misdirected
            }
            Target::Other => Route::Own { path: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let name = "echo".parse().unwrap();
        let domains = ["faas.local".to_owned(), "localhost".to_owned()];
        Identity { name, hosts: Hosts::new(name, &domains, &[], &[]) }
    }

    fn route(protocol: Protocol, target: &str, host: &str) -> Route {
        let identity = identity();
        identity.route(protocol, &identity.name, target.as_bytes(), Some(host.as_bytes()))
    }

    #[test]
    fn a_connection_that_moved_here_still_belongs_to_its_home() {
        let hello = "hello".parse().unwrap();
        let route = |target: &str, host: &str| {
            identity().route(Protocol::Https, &hello, target.as_bytes(), Some(host.as_bytes()))
        };
        assert_eq!(route("/function/echo/x", "hello.faas.local"), Route::Own { path: 14 });
        for target in ["/x", "*", "https://echo.faas.local/"] {
            for host in ["hello.faas.local", "echo.faas.local"] {
                assert_eq!(route(target, host), Route::Foreign(hello));
            }
        }
    }

    #[test]
    fn a_path_that_names_a_function_decides_alone() {
        for protocol in [Protocol::Http, Protocol::Https] {
            assert_eq!(route(protocol, "/function/echo/x?y", "hello.faas.local"), Route::Own { path: 14 });
            assert_eq!(
                route(protocol, "http://hello.faas.local/function/echo", "x"),
                Route::Own { path: 37 }
            );
            assert_eq!(
                route(protocol, "/function/hello", "echo.faas.local"),
                Route::Foreign("hello".parse().unwrap())
            );
            assert_eq!(
                route(protocol, "/function/echoevil", "echo.faas.local"),
                Route::Foreign("echoevil".parse().unwrap())
            );
            assert_eq!(route(protocol, "/function/%65cho", "echo.faas.local"), Route::NotFound);
            assert_eq!(route(protocol, "example.org:443", "echo.faas.local"), Route::Malformed);
        }
    }

    #[test]
    fn another_path_is_nobodys_in_the_clear() {
        for target in ["/", "*", "/x", "/function", "http://echo.faas.local/"] {
            assert_eq!(route(Protocol::Http, target, "echo.faas.local"), Route::NotFound, "{target}");
        }
    }

    #[test]
    fn another_path_under_tls_is_ours_unless_the_host_is_somebody_elses() {
        for host in [
            "echo.faas.local",
            "ECHO.FAAS.local:8443",
            "echo.localhost.",
            "localhost",
            "localhost:8443",
            "example.org",
            "hello.example.org",
            "hellofaas.local",
            "[::1]:8443",
            "",
        ] {
            assert_eq!(route(Protocol::Https, "/x", host), Route::Own { path: 0 }, "{host}");
        }
        for host in ["hello.faas.local", "Hello.Localhost:8443", "a.echo.faas.local", "hello.localhost."] {
            assert_eq!(route(Protocol::Https, "/x", host), Route::Misdirected, "{host}");
        }
        assert_eq!(route(Protocol::Https, "https://hello.localhost/", "echo.localhost"), Route::Misdirected);
        assert_eq!(route(Protocol::Https, "https://echo.localhost/", "x.localhost"), Route::Own { path: 0 });
        assert_eq!(identity().route(Protocol::Https, &identity().name, b"/", None), Route::Own { path: 0 });
    }
}

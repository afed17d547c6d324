//! The routes of a configuration: which key leads to which function.
use std::collections::HashMap;

use common::{FunctionName, Protocol, Verdict, route::RouteKey};

/// A function per index, and the index per key: its name under HTTP, its host names under TLS.
pub struct Routes {
    generation: u16,
    functions: Vec<FunctionName>,
    by_key: HashMap<RouteKey, u16>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the host name {0} is too long to route")]
    HostTooLong(String),
    #[error("{0} functions are more than a gateway routes to")]
    TooMany(usize),
}

impl Routes {
    pub fn new<'a, H>(
        generation: u16,
        functions: impl IntoIterator<Item = (FunctionName, H)>,
    ) -> Result<Self, Error>
    where
        H: IntoIterator<Item = &'a str>,
    {
        let mut routes = Self { generation, functions: Vec::new(), by_key: HashMap::new() };
        for (name, hosts) in functions {
            let count = routes.functions.len();
            let index = u16::try_from(count).map_err(|_| Error::TooMany(count))?;
            routes.functions.push(name);
            let path = RouteKey::new(generation, Protocol::Http, name.as_bytes());
            routes.by_key.extend(path.map(|key| (key, index)));
            for host in hosts {
                let key = RouteKey::new(generation, Protocol::Https, host.to_ascii_lowercase().as_bytes())
                    .ok_or_else(|| Error::HostTooLong(host.to_owned()))?;
                routes.by_key.insert(key, index);
            }
        }
        Ok(routes)
    }

    pub fn generation(&self) -> u16 {
        self.generation
    }

    pub fn entries(&self) -> impl ExactSizeIterator<Item = (RouteKey, u16)> {
        self.by_key.iter().map(|(key, index)| (*key, *index))
    }

    /// The verdict that a complete name gets.
    pub fn verdict(&self, key: &RouteKey) -> Verdict {
        match self.by_key.get(key) {
            Some(&index) => Verdict::Route { generation: self.generation, index },
            None => Verdict::Refused(common::Refusal::NoFunction),
        }
    }

    /// The function that a verdict names; `None` when it is of another configuration.
    pub fn function(&self, generation: u16, index: u16) -> Option<FunctionName> {
        if generation != self.generation {
            return None;
        }
        self.functions.get(usize::from(index)).copied()
    }
}

#[cfg(test)]
mod tests {
    use common::Refusal;

    use super::*;

    #[test]
    fn names_and_hosts_lead_to_their_function() {
        let names: Vec<FunctionName> = ["echo", "hello"].map(|name| name.parse().unwrap()).into();
        let routes =
            Routes::new(3, [(names[0], vec!["Echo.faas.local"]), (names[1], vec!["hello.faas.local"])])
                .unwrap();
        let verdict =
            |protocol, name: &str| routes.verdict(&RouteKey::new(3, protocol, name.as_bytes()).unwrap());
        assert_eq!(verdict(Protocol::Http, "echo"), Verdict::Route { generation: 3, index: 0 });
        assert_eq!(verdict(Protocol::Https, "echo.faas.local"), Verdict::Route { generation: 3, index: 0 });
        assert_eq!(verdict(Protocol::Https, "hello.faas.local"), Verdict::Route { generation: 3, index: 1 });
        assert_eq!(verdict(Protocol::Https, "echo"), Verdict::Refused(Refusal::NoFunction));
        assert_eq!(routes.function(3, 1), Some(names[1]));
        assert_eq!(routes.function(2, 1), None);
        assert_eq!(routes.function(3, 2), None);
    }
}

//! The routes of a configuration: which key leads to which function.
use std::collections::{HashMap, VecDeque};

use common::{FunctionName, Protocol, Verdict, route::RouteKey, verdict::GENERATION_MASK};
use tokio::time::Instant;

use crate::config::Config;

/// The first configuration's. None has 0, which is what a program reads where nothing was published.
pub const FIRST_GENERATION: u16 = 1;

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
    pub fn of(config: &Config, generation: u16) -> Result<Self, Error> {
        let functions = config.functions.iter();
        Self::new(
            generation,
            functions.map(|(name, function)| (*name, function.hosts.iter().map(String::as_str))),
        )
    }

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

    pub fn functions(&self) -> impl Iterator<Item = FunctionName> {
        self.functions.iter().copied()
    }

    /// The verdict that a complete name gets.
    pub fn verdict(&self, key: &RouteKey) -> Verdict {
        match self.by_key.get(key) {
            Some(&index) => Verdict::Route { generation: self.generation, index },
            None => Verdict::Refused(common::Refusal::NoFunction),
        }
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The function that a verdict names; `None` when it is of another configuration.
    pub fn function(&self, generation: u16, index: u16) -> Option<FunctionName> {
        if generation != self.generation {
            return None;
        }
        self.functions.get(usize::from(index)).copied()
    }
}

/// The routes that new verdicts are taken from, and former ones that a connection may still hold a verdict of.
pub struct Generations {
    current: Routes,
    /// With the time when no connection does any more, the oldest first.
    former: VecDeque<(Instant, Routes)>,
}

impl Generations {
    pub fn new(first: Routes) -> Self {
        Self { current: first, former: VecDeque::new() }
    }

    pub fn current(&self) -> &Routes {
        &self.current
    }

    /// The function that a verdict names.
    pub fn function(&self, generation: u16, index: u16) -> Option<FunctionName> {
        self.all().find_map(|routes| routes.function(generation, index))
    }

    /// A generation that no connection may hold.
    pub fn next_generation(&self) -> u16 {
        let mut next = self.current.generation;
        loop {
            next = if next >= GENERATION_MASK { FIRST_GENERATION } else { next + 1 };
            if self.all().all(|routes| routes.generation != next) {
                return next;
            }
        }
    }

    /// The routes of all generations.
    pub fn entries(&self) -> usize {
        self.all().map(Routes::len).sum()
    }

    pub fn replace(&mut self, routes: Routes, retire_at: Instant) {
        let former = std::mem::replace(&mut self.current, routes);
        self.former.push_back((retire_at, former));
    }

    pub fn next_retirement(&self) -> Option<Instant> {
        self.former.front().map(|(at, _)| *at)
    }

    /// Gives up the oldest generation if its time has come.
    pub fn take_retired(&mut self, now: Instant) -> Option<Routes> {
        self.former.pop_front_if(|(at, _)| *at <= now).map(|(_, routes)| routes)
    }

    fn all(&self) -> impl Iterator<Item = &Routes> {
        std::iter::once(&self.current).chain(self.former.iter().map(|(_, routes)| routes))
    }
}

#[cfg(test)]
mod tests {
    use std::{str::FromStr, time::Duration};

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
    #[test]
    fn verdicts_of_a_former_generation_hold_until_its_time_has_come() {
        let names: Vec<FunctionName> = ["echo", "hello"].map(|name| name.parse().unwrap()).into();
        let routes = |generation, name: FunctionName| Routes::new(generation, [(name, [])]).unwrap();
        let mut generations = Generations::new(routes(FIRST_GENERATION, names[0]));
        let (start, patience) = (Instant::now(), Duration::from_secs(10));
        let next = generations.next_generation();
        generations.replace(routes(next, names[1]), start + patience);
        assert_eq!(generations.function(FIRST_GENERATION, 0), Some(names[0]));
        assert_eq!(generations.function(next, 0), Some(names[1]));
        assert_eq!((generations.entries(), generations.next_retirement()), (2, Some(start + patience)));
        assert!(generations.take_retired(start).is_none());
        let retired = generations.take_retired(start + patience).unwrap();
        assert_eq!(retired.generation(), FIRST_GENERATION);
        assert_eq!(generations.function(FIRST_GENERATION, 0), None);
        assert_eq!((generations.entries(), generations.next_retirement()), (1, None));
    }

    #[test]
    fn generations_wrap_and_pass_over_those_that_are_held() {
        let routes =
            |generation| Routes::new(generation, [(FunctionName::from_str("echo").unwrap(), [])]).unwrap();
        let mut generations = Generations::new(routes(GENERATION_MASK - 1));
        let later = Instant::now() + Duration::from_secs(10);
        let mut given = vec![generations.current().generation()];
        for _ in 0..5 {
            let next = generations.next_generation();
            generations.replace(routes(next), later);
            given.push(next);
        }
        let mask = GENERATION_MASK;
        assert_eq!(given, [mask - 1, mask, 1, 2, 3, 4]);
        generations.current = routes(mask - 2);
        assert_eq!(generations.next_generation(), 4, "only those held by the former were passed over");
    }
}

//! Which functions may receive this one's connections.
use std::str::FromStr;

use common::{FunctionName, InvalidName};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Every function; under TLS, every one that the trust anchors vouch for.
    All,
    Only(Vec<FunctionName>),
}

impl Policy {
    pub fn allows(&self, function: &FunctionName) -> bool {
        match self {
            Self::All => true,
            Self::Only(functions) => functions.contains(function),
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::Only(Vec::new())
    }
}

/// `*`, or names between commas, or nothing.
impl FromStr for Policy {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match text.trim() {
            "*" => Ok(Self::All),
            "" => Ok(Self::default()),
            names => {
                names.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>().map(Self::Only)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_everybody_nobody_or_a_list() {
        let echo = "echo".parse().unwrap();
        assert_eq!("*".parse(), Ok(Policy::All));
        assert_eq!("".parse(), Ok(Policy::default()));
        assert!("hello, echo".parse::<Policy>().unwrap().allows(&echo));
        assert!(!"hello".parse::<Policy>().unwrap().allows(&echo));
        assert!(Policy::All.allows(&echo) && !Policy::default().allows(&echo));
        for wrong in ["Echo", "echo,", "*,echo"] {
            assert!(wrong.parse::<Policy>().is_err(), "{wrong}");
        }
    }
}

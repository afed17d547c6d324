//! A number of bytes, as people write it: `268435456` or `"256M"`.
use std::fmt;

use serde::Deserialize;

/// A suffix and what it multiplies by, the largest first; the powers are of two, as systemd's `MemoryMax=` has them.
const UNITS: [(char, u64); 4] = [('T', 1 << 40), ('G', 1 << 30), ('M', 1 << 20), ('K', 1 << 10)];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// As it stands in the file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a size is a number of bytes or a text such as \"256M\"")]
pub enum Size {
    Number(u64),
    Text(String),
}

impl Size {
    pub fn bytes(&self) -> Result<Bytes, String> {
        let text = match self {
            Self::Number(bytes) => return Ok(Bytes(*bytes)),
            Self::Text(text) => text,
        };
        parse(text)
            .ok_or_else(|| format!("{text:?} is no size; right would be bytes, or \"64K\", \"256M\", \"2G\""))
    }
}

fn parse(text: &str) -> Option<Bytes> {
    let unit = UNITS.iter().find_map(|&(suffix, factor)| Some((text.strip_suffix(suffix)?, factor)));
    let (number, factor) = unit.unwrap_or((text, 1));
    // `u64::from_str` takes a plus sign.
    let number: u64 = number.parse().ok().filter(|_| !number.starts_with('+'))?;
    number.checked_mul(factor).map(Bytes)
}

/// In the largest unit that leaves no rest, so that what is read was what is written.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|&&(_, factor)| self.0 > 0 && self.0.is_multiple_of(factor)) {
            Some((suffix, factor)) => write!(f, "{}{suffix}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_or_without_a_unit() {
        for (text, bytes) in
            [("0", 0), ("1000", 1000), ("4K", 4096), ("256M", 1 << 28), ("2G", 1 << 31), ("1T", 1 << 40)]
        {
            assert_eq!(parse(text), Some(Bytes(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "+1", "1.5G", "1 G", "1m", "1MB", "99999999999999999999", "99999999T"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read_as_the_same(bytes: u64) {
            proptest::prop_assert_eq!(parse(&Bytes(bytes).to_string()), Some(Bytes(bytes)));
        }
    }
}

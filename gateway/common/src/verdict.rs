//! Where a connection belongs, as one word that the kernel writes and the gateway reads.
use crate::Refusal;

/// What a connection's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// More bytes are needed.
    Pending,
    /// The route that the configuration of this generation gave the index.
    Route {
        generation: u16,
        index: u16,
    },
    Refused(Refusal),
    /// The kernel could not keep the connection's bytes exact: it must be destroyed.
    Poisoned,
    /// The connection closed before its verdict.
    Closed,
}

// The low bits of a word say its kind, so that a zeroed word is `Pending`.
const KIND_BITS: u32 = 2;
const KIND_PENDING: u32 = 0;
const KIND_ROUTE: u32 = 1;
const KIND_REFUSED: u32 = 2;
const KIND_ENDED: u32 = 3;

const DETAIL_POISONED: u32 = 0;
const DETAIL_CLOSED: u32 = 1;

/// Generations wrap here: with the route's index they fill a word.
pub const GENERATION_MASK: u16 = (1 << 14) - 1;

impl Verdict {
    #[inline(always)]
    pub const fn to_word(self) -> u32 {
        match self {
            Self::Pending => KIND_PENDING,
            Self::Route { generation, index } => {
                ((index as u32) << 16) | (((generation & GENERATION_MASK) as u32) << KIND_BITS) | KIND_ROUTE
            }
            Self::Refused(refusal) => ((refusal.code() as u32) << KIND_BITS) | KIND_REFUSED,
            Self::Poisoned => (DETAIL_POISONED << KIND_BITS) | KIND_ENDED,
            Self::Closed => (DETAIL_CLOSED << KIND_BITS) | KIND_ENDED,
        }
    }

    /// `None` for a word that no verdict has.
    pub const fn from_word(word: u32) -> Option<Self> {
        let detail = word >> KIND_BITS;
        match word & ((1 << KIND_BITS) - 1) {
            KIND_ROUTE => {
                Some(Self::Route { generation: detail as u16 & GENERATION_MASK, index: (word >> 16) as u16 })
            }
            KIND_REFUSED if detail <= u8::MAX as u32 => match Refusal::from_code(detail as u8) {
                Some(refusal) => Some(Self::Refused(refusal)),
                None => None,
            },
            KIND_PENDING if detail == 0 => Some(Self::Pending),
            KIND_ENDED if detail == DETAIL_POISONED => Some(Self::Poisoned),
            KIND_ENDED if detail == DETAIL_CLOSED => Some(Self::Closed),
            _ => None,
        }
    }
}

/// Whether a word is a route's, for code that can't afford to parse it.
#[inline(always)]
pub const fn is_route(word: u32) -> bool {
    word & ((1 << KIND_BITS) - 1) == KIND_ROUTE
}

/// The address that `accept4` gives in place of the peer's: the verdict, in multicast space, which no TCP peer can own.
///
/// A tag drawn at each start tells this gateway's programs from those that another one left.
pub mod address {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

    const MULTICAST_V4: u32 = 0xe000_0000;
    const MULTICAST_V6: u32 = 0xff00_0000;
    pub const TAG_MASK: u32 = 0x0fff;

    /// An IPv4 address and port, in host byte order: 12 bits of tag and the word.
    #[inline(always)]
    pub const fn encode_v4(tag: u32, word: u32) -> (u32, u16) {
        (MULTICAST_V4 | ((tag & TAG_MASK) << 16) | (word >> 16), word as u16)
    }

    /// The first and the last 32 bits of an IPv6 address, in host byte order; the rest is zero.
    #[inline(always)]
    pub const fn encode_v6(tag: u32, word: u32) -> (u32, u32) {
        (MULTICAST_V6 | (tag & TAG_MASK), word)
    }

    /// The word, if the address is one of this tag's.
    pub fn decode(tag: u32, address: SocketAddr) -> Option<u32> {
        match address.ip() {
            IpAddr::V4(ip) => {
                let word = (ip.to_bits() << 16) | u32::from(address.port());
                (ip == Ipv4Addr::from_bits(encode_v4(tag, word).0)).then_some(word)
            }
            IpAddr::V6(ip) => {
                let word = ip.to_bits() as u32;
                let (first, last) = encode_v6(tag, word);
                (ip == Ipv6Addr::from_bits(u128::from(first) << 96 | u128::from(last))).then_some(word)
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn v4(tag: u32, word: u32) -> SocketAddr {
            let (ip, port) = encode_v4(tag, word);
            (Ipv4Addr::from_bits(ip), port).into()
        }

        fn v6(tag: u32, word: u32) -> SocketAddr {
            let (first, last) = encode_v6(tag, word);
            (Ipv6Addr::from_bits(u128::from(first) << 96 | u128::from(last)), 0).into()
        }

        proptest::proptest! {
            #[test]
            fn words_travel_in_multicast_addresses(tag in 0u32..=TAG_MASK, word: u32) {
                for address in [v4(tag, word), v6(tag, word)] {
                    proptest::prop_assert!(address.ip().is_multicast());
                    proptest::prop_assert_eq!(decode(tag, address), Some(word));
                    proptest::prop_assert_eq!(decode(tag ^ 1, address), None);
                }
            }
        }

        #[test]
        fn peers_are_not_verdicts() {
            for peer in ["127.0.0.1:80", "241.0.18.52:1", "[::1]:80", "[fdff::1]:80", "[::ffff:127.0.0.1]:1"]
            {
                assert_eq!(decode(0, peer.parse().unwrap()), None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn routes_survive_their_word(generation in 0..=GENERATION_MASK, index: u16) {
            let verdict = Verdict::Route { generation, index };
            proptest::prop_assert_eq!(Verdict::from_word(verdict.to_word()), Some(verdict));
        }

        #[test]
        fn a_word_is_a_verdict_or_nothing(word: u32) {
            if let Some(verdict) = Verdict::from_word(word) {
                proptest::prop_assert_eq!(verdict.to_word(), word);
                proptest::prop_assert_eq!(is_route(word), matches!(verdict, Verdict::Route { .. }));
            }
        }
    }

    #[test]
    fn the_rest_survives_too() {
        for verdict in [Verdict::Pending, Verdict::Poisoned, Verdict::Closed]
            .into_iter()
            .chain(Refusal::ALL.map(Verdict::Refused))
        {
            assert_eq!(Verdict::from_word(verdict.to_word()), Some(verdict));
        }
        assert_eq!(Verdict::from_word(Verdict::Pending.to_word()), Verdict::from_word(0));
    }
}

//! Which of several instances or workers gets a connection.

/// The less loaded of two candidates drawn at random; when both are full, the next one that is not.
///
/// Two choices keep the loads nearly even where one draw would not, and unlike a search for the least loaded they
/// don't send a whole burst to one instance whose counters are a moment old.
pub fn of_two<L: Ord>(
    candidates: usize,
    random: u64,
    mut load: impl FnMut(usize) -> Option<L>,
) -> Option<usize> {
    if candidates == 0 {
        return None;
    }
    let first = random as u32 as usize % candidates;
    let Some(others) = candidates.checked_sub(1).filter(|&others| others > 0) else {
        return load(first).map(|_| first);
    };
    let second = (first + 1 + (random >> 32) as usize % others) % candidates;
    match (load(first), load(second)) {
        (Some(of_first), Some(of_second)) => Some(if of_second < of_first { second } else { first }),
        (Some(_), None) => Some(first),
        (None, Some(_)) => Some(second),
        (None, None) => {
            (1..candidates).map(|step| (first + step) % candidates).find(|&index| load(index).is_some())
        }
    }
}

/// The least loaded candidate and its load.
pub fn of_all<L: Ord + Copy>(loads: impl IntoIterator<Item = Option<L>>) -> Option<(usize, L)> {
    let known = loads.into_iter().enumerate().filter_map(|(index, load)| Some((index, load?)));
    known.min_by_key(|&(_, load)| load)
}

/// Numbers that spread choices; nobody gains by guessing them (SplitMix64).
pub struct Draws(u64);

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whoever_has_room_is_found(loads in prop::collection::vec(any::<Option<u8>>(), 0..9), random: u64) {
            let chosen = of_two(loads.len(), random, |index| loads[index]);
            prop_assert_eq!(chosen.is_some(), loads.iter().any(Option::is_some));
            if let Some(chosen) = chosen {
                prop_assert!(loads[chosen].is_some());
            }
        }

        #[test]
        fn of_two_candidates_the_less_loaded_wins(a: u8, b: u8, random: u64) {
            let loads = [a, b];
            let chosen = of_two(2, random, |index| Some(loads[index])).unwrap();
            prop_assert_eq!(loads[chosen], a.min(b));
        }

        #[test]
        fn of_all_the_least_loaded_wins(loads in prop::collection::vec(any::<Option<u8>>(), 0..9)) {
            let least = loads.iter().flatten().min().copied();
            prop_assert_eq!(of_all(loads.clone()).map(|(_, load)| load), least);
        }
    }

    #[test]
    fn two_choices_keep_loads_even() {
        let (mut draws, mut loads) = (Draws::new(1), [0u32; 10]);
        for _ in 0..10_000 {
            let chosen = of_two(10, draws.draw(), |index| Some(loads[index])).unwrap();
            loads[chosen] += 1;
        }
        assert!(loads.iter().all(|load| load.abs_diff(1000) < 10), "{loads:?}");
    }

    #[test]
    fn every_candidate_is_drawn() {
        let (mut draws, mut seen) = (Draws::new(1), [false; 7]);
        for _ in 0..1000 {
            seen[of_two(7, draws.draw(), |_| Some(0)).unwrap()] = true;
        }
        assert_eq!(seen, [true; 7]);
    }
}

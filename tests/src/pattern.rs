//! Bodies that say at every offset what must stand there, and numbers that a seed repeats.

/// A pseudo-random body of any length that is never held in memory.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    seed: u64,
}

impl Pattern {
    pub const fn new(seed: u64) -> Self {
        Self { seed: mix(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)) }
    }

    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        let mut position = 0;
        while position < bytes.len() {
            let at = offset + position as u64;
            let word = mix(self.seed.wrapping_add(at / 8)).to_le_bytes();
            let part = &word[(at % 8) as usize..];
            let length = part.len().min(bytes.len() - position);
            bytes[position..position + length].copy_from_slice(&part[..length]);
            position += length;
        }
    }

    pub fn bytes(self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(0, &mut bytes);
        bytes
    }

    /// The offset of the first byte that is not the body's.
    pub fn first_difference(self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let mut expected = vec![0; bytes.len()];
        self.fill(offset, &mut expected);
        let difference = bytes.iter().zip(&expected).position(|(got, wanted)| got != wanted)?;
        Some(offset + difference as u64)
    }
}

/// A generator whose seed stands in every failure's message.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.number() % limit as u64) as usize
    }

    pub fn within(&mut self, first: usize, last: usize) -> usize {
        first + self.below(last - first + 1)
    }

    pub fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        Pattern::new(self.number()).bytes(length)
    }

    /// Sorted, distinct offsets strictly inside `length` bytes.
    pub fn cuts(&mut self, length: usize, count: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> =
            if length < 2 { Vec::new() } else { (0..count).map(|_| self.within(1, length - 1)).collect() };
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }
}

/// SplitMix64's output function.
const fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_the_whole_bodys() {
        let pattern = Pattern::new(3);
        let whole = pattern.bytes(100);
        for start in 0..100 {
            let mut part = vec![0; 100 - start];
            pattern.fill(start as u64, &mut part);
            assert_eq!(part, whole[start..]);
            assert_eq!(pattern.first_difference(start as u64, &part), None);
        }
    }

    #[test]
    fn a_wrong_byte_is_found_where_it_is() {
        let pattern = Pattern::new(4);
        let mut bytes = pattern.bytes(64);
        bytes[17] ^= 1;
        assert_eq!(pattern.first_difference(0, &bytes), Some(17));
    }

    #[test]
    fn cuts_lie_inside() {
        let cuts = Random::new(1).cuts(10, 30);
        assert!(cuts.is_sorted() && cuts.first() >= Some(&1) && cuts.last() <= Some(&9));
        assert!(Random::new(1).cuts(1, 5).is_empty());
    }
}

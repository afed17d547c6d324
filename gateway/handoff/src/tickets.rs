//! Keys for session tickets (RFC 5077, RFC 8446 §4.6.1), which a parent shares with all instances of one function and renews.
//!
//! Time is cut into periods. The page has the keys of the last period, of this one and of the next, so that nobody waits for
//! the parent when a period begins; older ones are wiped, and with them goes what could be read with their help.
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
        fence,
    },
    time::Duration,
};

use rustix::{
    rand::{GetRandomFlags, getrandom},
    time::{ClockId, clock_gettime},
};
use zeroize::Zeroizing;

use crate::shared::{PAGE_BYTES, Read, Shared, Written};

/// How long new tickets are made with one key; they are good for as long again.
pub const TICKET_PERIOD: Duration = Duration::from_secs(6 * 3600);

pub const TICKET_NAME_BYTES: usize = 16;
pub const TICKET_KEY_BYTES: usize = 32;

const NAME_WORDS: usize = TICKET_NAME_BYTES / 8;
const KEY_WORDS: usize = TICKET_KEY_BYTES / 8;

/// Three that are in use, and one that nobody looks at while it is written.
const SLOTS: usize = 4;

/// A stretch of the time since the host started, the same for all its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TicketPeriod(pub u64);

impl TicketPeriod {
    pub fn now() -> Self {
        let seconds = u64::try_from(clock_gettime(ClockId::Boottime).tv_sec).unwrap_or_default();
        // None is 0, which stands for an empty slot, and each has one before it.
        Self(2 + seconds / TICKET_PERIOD.as_secs())
    }

    pub fn before(self) -> Self {
        Self(self.0 - 1)
    }

    fn after(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A key and the name that tickets know it by.
pub struct TicketKey {
    pub name: [u8; TICKET_NAME_BYTES],
    pub key: Zeroizing<[u8; TICKET_KEY_BYTES]>,
}

#[repr(C)]
struct Slot {
    /// 0 while there is no key, or only half of one.
    period: AtomicU64,
    name: [AtomicU64; NAME_WORDS],
    key: [AtomicU64; KEY_WORDS],
}

#[repr(C)]
struct Page {
    slots: [Slot; SLOTS],
    reserved: [u8; PAGE_BYTES - SLOTS * size_of::<Slot>()],
}

const _: () = assert!(size_of::<Page>() == PAGE_BYTES && align_of::<Page>() <= 16);

// SAFETY: it is as large as a page, and made of integers, of which those that change are atomics.
unsafe impl Shared for Page {}

/// The parent's side.
pub struct TicketKeysWriter(Written);

impl TicketKeysWriter {
    pub fn create() -> io::Result<Self> {
        let writer = Self(Written::create("pointsman-tickets")?);
        writer.renew(TicketPeriod::now())?;
        Ok(writer)
    }

    /// Makes the keys of this period and of the next one, unless there are some, and wipes those that nobody may use any
    /// more. To be called more often than once in a period.
    pub fn renew(&self, now: TicketPeriod) -> io::Result<()> {
        let kept = now.before()..=now.after();
        for slot in &self.page().slots {
            if !kept.contains(&TicketPeriod(slot.period.load(Relaxed))) {
                slot.wipe();
            }
        }
        for period in [now, now.after()] {
            let slot = self.page().slot(period);
            if slot.period.load(Relaxed) != period.0 {
                slot.fill(period)?;
            }
        }
        Ok(())
    }

    fn page(&self) -> &Page {
        self.0.get()
    }
}

impl AsFd for TicketKeysWriter {
    /// The memory, to be passed to the instances.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for TicketKeysWriter {
    fn drop(&mut self) {
        self.page().slots.iter().for_each(Slot::wipe);
    }
}

/// An instance's side.
pub struct TicketKeysReader(Read);

impl TicketKeysReader {
    /// Maps memory that the parent passed. The error says what is wrong with it.
    pub fn open(memory: OwnedFd) -> Result<Self, String> {
        Read::open(memory).map(Self)
    }

    /// The key of a period, if the parent has made one and not wiped it yet.
    pub fn key(&self, period: TicketPeriod) -> Option<TicketKey> {
        self.0.get::<Page>().slot(period).read(period)
    }
}

impl Page {
    fn slot(&self, period: TicketPeriod) -> &Slot {
        &self.slots[(period.0 % SLOTS as u64) as usize]
    }
}

impl Slot {
    fn wipe(&self) {
        self.period.store(0, Relaxed);
        fence(Release);
        self.name.iter().chain(&self.key).for_each(|word| word.store(0, Relaxed));
    }

    fn fill(&self, period: TicketPeriod) -> io::Result<()> {
        let mut random = Zeroizing::new([0; TICKET_NAME_BYTES + TICKET_KEY_BYTES]);
        // Up to 256 bytes come whole, if they come.
        getrandom(&mut random[..], GetRandomFlags::empty())?;
        self.wipe();
        for (word, bytes) in self.name.iter().chain(&self.key).zip(random.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
        self.period.store(period.0, Release);
        Ok(())
    }

    fn read(&self, period: TicketPeriod) -> Option<TicketKey> {
        if self.period.load(Acquire) != period.0 {
            return None;
        }
        let mut read = TicketKey { name: Default::default(), key: Zeroizing::default() };
        let chunks = read.name.as_chunks_mut().0.iter_mut().chain(read.key.as_chunks_mut().0);
        for (bytes, word) in chunks.zip(self.name.iter().chain(&self.key)) {
            *bytes = word.load(Relaxed).to_ne_bytes();
        }
        fence(Acquire);
        (self.period.load(Relaxed) == period.0).then_some(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: TicketPeriod = TicketPeriod(10);

    fn pair() -> (TicketKeysWriter, TicketKeysReader) {
        let writer = TicketKeysWriter(Written::create("test").unwrap());
        let reader = TicketKeysReader::open(writer.as_fd().try_clone_to_owned().unwrap()).unwrap();
        (writer, reader)
    }

    fn key(reader: &TicketKeysReader, period: u64) -> Option<[u8; TICKET_KEY_BYTES]> {
        reader.key(TicketPeriod(period)).map(|key| *key.key)
    }

    #[test]
    fn a_key_is_there_from_before_its_period_to_the_end_of_the_next_one() {
        let (writer, reader) = pair();
        assert!((8..13).all(|period| key(&reader, period).is_none()));
        writer.renew(FIRST).unwrap();
        let keys = [10, 11].map(|period| key(&reader, period).unwrap());
        assert_ne!(keys[0], keys[1]);
        assert_ne!(keys[0], [0; TICKET_KEY_BYTES]);
        assert!(key(&reader, 9).is_none() && key(&reader, 12).is_none());
        // More often changes nothing.
        writer.renew(FIRST).unwrap();
        assert_eq!([10, 11].map(|period| key(&reader, period).unwrap()), keys);
        writer.renew(FIRST.after()).unwrap();
        assert_eq!([10, 11].map(|period| key(&reader, period).unwrap()), keys);
        assert!(key(&reader, 12).is_some());
        writer.renew(TicketPeriod(12)).unwrap();
        assert!(key(&reader, 10).is_none());
        assert_eq!(key(&reader, 11), Some(keys[1]));
    }

    #[test]
    fn after_a_long_pause_nothing_old_is_left() {
        let (writer, reader) = pair();
        writer.renew(FIRST).unwrap();
        let page: &Page = writer.0.get();
        writer.renew(TicketPeriod(FIRST.0 + 2)).unwrap();
        assert!(key(&reader, 10).is_none() && key(&reader, 11).is_some());
        writer.renew(TicketPeriod(FIRST.0 + 100)).unwrap();
        let used = page.slots.iter().filter(|slot| slot.key.iter().any(|word| word.load(Relaxed) != 0));
        assert_eq!(used.count(), 2);
        drop(writer);
        assert!(key(&reader, 110).is_none());
    }

    #[test]
    fn all_readers_have_the_same_keys_and_names() {
        let (writer, reader) = pair();
        writer.renew(FIRST).unwrap();
        let other = TicketKeysReader::open(writer.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let [one, two] = [&reader, &other].map(|reader| reader.key(FIRST).unwrap());
        assert_eq!((one.name, *one.key), (two.name, *two.key));
        assert_ne!(reader.key(FIRST.after()).unwrap().name, one.name);
    }

    #[test]
    fn time_has_a_period_and_that_one_before_it() {
        let now = TicketPeriod::now();
        assert!(now.before().0 > 0 && now.before() < now);
    }
}

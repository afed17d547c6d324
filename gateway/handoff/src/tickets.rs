//! Keys for session tickets (RFC 5077, RFC 8446 §4.6.1), which a parent shares with all instances of one function and renews.
//!
//! Time is cut into periods. The page has the keys of this period and of the last one, and shortly before it begins that of
//! the next, so that nobody waits for the parent; older ones are wiped.
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{
        AtomicU8, AtomicU64,
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

/// How long before its period a key is made: no earlier than is needed, because who reads the page has it.
const LEAD: Duration = Duration::from_secs(300);

pub const TICKET_NAME_BYTES: usize = 16;
pub const TICKET_KEY_BYTES: usize = 32;

const NAME_WORDS: usize = TICKET_NAME_BYTES / 8;
const KEY_WORDS: usize = TICKET_KEY_BYTES / 8;

/// Three that are in use, and one that nobody looks at while it is written.
const SLOTS: usize = 4;

/// A stretch of the time since the host started, the same for all its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TicketPeriod(u64);

impl TicketPeriod {
    pub fn now() -> Self {
        Self::after_start(since_start())
    }

    /// The next one, if it begins within minutes.
    pub fn soon() -> Self {
        Self::after_start(since_start() + LEAD)
    }

    fn after_start(time: Duration) -> Self {
        // None is 0, which stands for an empty slot, and each has one before it.
        Self(2 + time.as_secs() / TICKET_PERIOD.as_secs())
    }

    pub fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    pub fn after(self) -> Self {
        Self(self.0 + 1)
    }

    pub fn number(self) -> u64 {
        self.0
    }

    /// The period of this number, if there is one.
    pub fn from_number(number: u64) -> Option<Self> {
        (number > 0).then_some(Self(number))
    }
}

fn since_start() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// A key and the name that tickets know it by.
pub struct TicketKey {
    pub name: [u8; TICKET_NAME_BYTES],
    /// On the heap, so that no copy stays behind where it was moved from.
    pub key: Box<Zeroizing<[u8; TICKET_KEY_BYTES]>>,
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
    reserved: [AtomicU8; PAGE_BYTES - SLOTS * size_of::<Slot>()],
}

const _: () = assert!(size_of::<Page>() == PAGE_BYTES && align_of::<Page>() <= 16);

// SAFETY: it is as large as a page and made of atomics, which the reader below loads with `Relaxed`.
unsafe impl Shared for Page {}

/// The parent's side.
pub struct TicketKeysWriter(Written);

impl TicketKeysWriter {
    pub fn create() -> io::Result<Self> {
        let writer = Self(Written::create("pointsman-tickets")?.lock());
        writer.renew(TicketPeriod::now(), TicketPeriod::soon())?;
        Ok(writer)
    }

    /// Makes the keys that are needed now or soon and aren't there, and wipes those that nobody may use any more. To be
    /// called every minute or so.
    pub fn renew(&self, now: TicketPeriod, soon: TicketPeriod) -> io::Result<()> {
        let kept = now.before()..=soon;
        for slot in &self.page().slots {
            if !kept.contains(&TicketPeriod(slot.period.load(Relaxed))) {
                slot.wipe();
            }
        }
        for period in [now, soon] {
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
        Read::open(memory).map(Read::lock).map(Self)
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
        if self.period.load(Relaxed) != period.0 || period.0 == 0 {
            return None;
        }
        fence(Acquire);
        let mut read = TicketKey { name: Default::default(), key: Box::default() };
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
        reader.key(TicketPeriod(period)).map(|key| **key.key)
    }

    #[test]
    fn a_key_is_there_from_shortly_before_its_period_to_the_end_of_the_next_one() {
        let (writer, reader) = pair();
        assert!((8..13).all(|period| key(&reader, period).is_none()));
        writer.renew(FIRST, FIRST).unwrap();
        let first = key(&reader, 10).unwrap();
        assert_ne!(first, [0; TICKET_KEY_BYTES]);
        assert!(key(&reader, 9).is_none() && key(&reader, 11).is_none());
        writer.renew(FIRST, FIRST.after()).unwrap();
        let second = key(&reader, 11).unwrap();
        assert_ne!(first, second);
        // More often changes nothing.
        for now in [FIRST, FIRST.after()] {
            writer.renew(now, FIRST.after()).unwrap();
            assert_eq!([10, 11].map(|period| key(&reader, period).unwrap()), [first, second]);
        }
        writer.renew(TicketPeriod(12), TicketPeriod(12)).unwrap();
        assert!(key(&reader, 10).is_none() && key(&reader, 12).is_some());
        assert_eq!(key(&reader, 11), Some(second));
    }

    #[test]
    fn after_a_long_pause_nothing_old_is_left() {
        let (writer, reader) = pair();
        writer.renew(FIRST, FIRST.after()).unwrap();
        let later = TicketPeriod(FIRST.0 + 100);
        writer.renew(later, later).unwrap();
        let page: &Page = writer.0.get();
        let used = page.slots.iter().filter(|slot| slot.key.iter().any(|word| word.load(Relaxed) != 0));
        assert_eq!(used.count(), 1);
        drop(writer);
        assert!(key(&reader, later.0).is_none());
    }

    #[test]
    fn all_readers_have_the_same_keys_and_names() {
        let (writer, reader) = pair();
        writer.renew(FIRST, FIRST.after()).unwrap();
        let other = TicketKeysReader::open(writer.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let [one, two] = [&reader, &other].map(|reader| reader.key(FIRST).unwrap());
        assert_eq!((one.name, **one.key), (two.name, **two.key));
        assert_ne!(reader.key(FIRST.after()).unwrap().name, one.name);
    }

    #[test]
    fn a_reader_never_sees_half_a_key() {
        let (writer, reader) = pair();
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                for period in (10..20_000).map(TicketPeriod) {
                    writer.renew(period, period.after()).unwrap();
                }
            });
            while !writing.is_finished() {
                // Every fourth period has the same slot: the writer is at one of these.
                for period in (10..20_000).step_by(499) {
                    let [one, two] = [(); 2].map(|()| reader.key(TicketPeriod(period)));
                    if let Some((one, two)) = one.zip(two) {
                        assert_eq!((one.name, **one.key), (two.name, **two.key));
                    }
                }
            }
        });
    }

    #[test]
    fn time_has_a_period_and_that_one_before_it() {
        let now = TicketPeriod::now();
        assert!(now.before() < now && now.before().0 > 0);
        assert!([now, now.after()].contains(&TicketPeriod::soon()));
        let period = |seconds| TicketPeriod::after_start(Duration::from_secs(seconds)).0;
        assert_eq!([0, 6 * 3600 - 1, 6 * 3600].map(period), [2, 2, 3]);
        assert!(TicketPeriod::from_number(0).is_none());
        let (_writer, reader) = pair();
        assert!(reader.key(TicketPeriod(0)).is_none());
    }
}

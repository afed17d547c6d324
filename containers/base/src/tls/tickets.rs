//! Session tickets that every instance of a function can open, made with keys that their parent shares and renews.
//!
//! A ticket names its key and has a random salt, from which and the key its own AEAD key is derived: nothing is used twice,
//! however many instances make tickets, and none can be told to follow another. The function's certificate is part of the
//! derivation, so that a session does not outlive the certificate that its client has seen.
use std::{
    fmt, io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use handoff::{
    TICKET_KEY_BYTES, TICKET_NAME_BYTES, TICKET_PERIOD, TicketKey, TicketKeysReader, TicketPeriod,
};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    digest,
    hkdf::{HKDF_SHA256, Salt},
    rand::{SecureRandom, SystemRandom},
};
use rustls::server::ProducesTickets;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

const SALT_BYTES: usize = 32;
const HEADER_BYTES: usize = TICKET_NAME_BYTES + SALT_BYTES;
const LABEL: &[u8] = b"pointsman ticket 1";

/// What rustls keeps in a ticket is a few hundred bytes, unless the client showed a certificate, which none does here.
const TICKET_BYTES_MAX: usize = 4096;

pub struct Tickets {
    keys: TicketKeysReader,
    /// Of the function's certificate.
    digest: digest::Digest,
}

impl Tickets {
    /// For keys that a parent has passed.
    pub fn new(memory: OwnedFd, certificate: &CertificateDer<'_>) -> io::Result<Self> {
        let keys = TicketKeysReader::open(memory).map_err(io::Error::other)?;
        Ok(Self { keys, digest: digest::digest(&digest::SHA256, certificate) })
    }

    /// What one connection's handshake makes and opens tickets with.
    pub fn for_connection(self: &Arc<Self>) -> Arc<dyn ProducesTickets> {
        Arc::new(ForConnection { tickets: Arc::clone(self), origin: AtomicU64::new(u64::MAX) })
    }

    /// `origin` is when the session began.
    fn seal(&self, plain: &[u8], origin: TicketPeriod, now: TicketPeriod) -> Option<Vec<u8>> {
        let key = self.keys.key(now)?;
        let mut header = [0; HEADER_BYTES];
        let (name, salt) = header.split_at_mut(TICKET_NAME_BYTES);
        name.copy_from_slice(&key.name);
        SystemRandom::new().fill(salt).ok()?;
        let mut body = Zeroizing::new([&origin.number().to_le_bytes(), plain].concat());
        let tag = self
            .derive(&key, &header)?
            .seal_in_place_separate_tag(nonce(), Aad::from(header), &mut body)
            .ok()?;
        Some([&header, &body[..], tag.as_ref()].concat())
    }

    fn open(&self, ticket: &[u8], now: TicketPeriod) -> Option<(Vec<u8>, TicketPeriod)> {
        if ticket.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (header, body) = ticket.split_first_chunk::<HEADER_BYTES>()?;
        let periods = [now, now.before()].into_iter();
        let key =
            periods.filter_map(|period| self.keys.key(period)).find(|key| header.starts_with(&key.name))?;
        let mut body = Zeroizing::new(body.to_vec());
        let opened = self.derive(&key, header)?.open_in_place(nonce(), Aad::from(*header), &mut body).ok()?;
        let (origin, plain) = opened.split_first_chunk()?;
        let origin = TicketPeriod::from_number(u64::from_le_bytes(*origin))?;
        (now.before() <= origin).then(|| (plain.to_vec(), origin))
    }

    /// The key of one ticket (RFC 5869).
    fn derive(&self, key: &TicketKey, header: &[u8; HEADER_BYTES]) -> Option<LessSafeKey> {
        let mut bytes = Zeroizing::new([0; TICKET_KEY_BYTES]);
        Salt::new(HKDF_SHA256, self.digest.as_ref())
            .extract(&key.key[..])
            .expand(&[LABEL, header], &AES_256_GCM)
            .and_then(|derived| derived.fill(&mut bytes[..]))
            .ok()?;
        UnboundKey::new(&AES_256_GCM, &bytes[..]).map(LessSafeKey::new).ok()
    }
}

/// A key seals one ticket, so it needs no other.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

/// A resumed session's new ticket says when the session began: in TLS 1.2 it holds the very secret of the old one, which
/// must not go on from key to key.
struct ForConnection {
    tickets: Arc<Tickets>,
    /// The earliest period in which a session began that the client offers to resume; before that, one that never comes.
    origin: AtomicU64,
}

impl ProducesTickets for ForConnection {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        TICKET_PERIOD.as_secs() as u32
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let now = TicketPeriod::now();
        let origin = TicketPeriod::from_number(self.origin.load(Relaxed))?;
        self.tickets.seal(plain, origin.min(now), now)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (plain, origin) = self.tickets.open(ticket, TicketPeriod::now())?;
        self.origin.fetch_min(origin.number(), Relaxed);
        Some(plain)
    }
}

impl fmt::Debug for ForConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForConnection").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use handoff::TicketKeysWriter;
    use proptest::prelude::*;

    use super::*;

    const SESSION: &[u8] = b"what a server would have to remember";

    fn instance(parent: &TicketKeysWriter, certificate: &[u8]) -> Arc<Tickets> {
        let memory = parent.as_fd().try_clone_to_owned().unwrap();
        Arc::new(Tickets::new(memory, &CertificateDer::from(certificate)).unwrap())
    }

    #[test]
    fn every_instance_with_the_same_certificate_opens_a_ticket() {
        let parent = TicketKeysWriter::create().unwrap();
        let [one, two] = [(); 2].map(|()| instance(&parent, b"certificate").for_connection());
        let ticket = one.encrypt(SESSION).unwrap();
        assert_eq!(two.decrypt(&ticket).unwrap(), SESSION);
        assert_eq!(one.decrypt(&ticket).unwrap(), SESSION);
        assert!(instance(&parent, b"another").for_connection().decrypt(&ticket).is_none());
        let stranger = TicketKeysWriter::create().unwrap();
        assert!(instance(&stranger, b"certificate").for_connection().decrypt(&ticket).is_none());
        // Nobody can tell that two were made by one.
        let again = one.encrypt(SESSION).unwrap();
        assert_ne!(ticket[TICKET_NAME_BYTES..], again[TICKET_NAME_BYTES..]);
    }

    #[test]
    fn a_ticket_is_good_in_its_period_and_the_next_one() {
        let parent = TicketKeysWriter::create().unwrap();
        let tickets = instance(&parent, b"certificate");
        let first = TicketPeriod::now();
        let (second, third) = (first.after(), first.after().after());
        let ticket = tickets.seal(SESSION, first, first).unwrap();
        parent.renew(second, second).unwrap();
        assert_eq!(tickets.open(&ticket, second).unwrap(), (SESSION.to_vec(), first));
        let newer = tickets.seal(SESSION, second, second).unwrap();
        // Whether or not the parent has wiped the key yet.
        assert!(tickets.open(&ticket, third).is_none());
        parent.renew(third, third).unwrap();
        assert!(tickets.open(&ticket, third).is_none() && tickets.open(&ticket, second).is_none());
        assert_eq!(tickets.open(&newer, third).unwrap(), (SESSION.to_vec(), second));
    }

    #[test]
    fn a_session_does_not_outlive_its_time_by_being_resumed() {
        let parent = TicketKeysWriter::create().unwrap();
        let tickets = instance(&parent, b"certificate");
        let first = TicketPeriod::now();
        let (second, third) = (first.after(), first.after().after());
        parent.renew(second, second).unwrap();
        let resumed = tickets.seal(SESSION, first, second).unwrap();
        assert_eq!(tickets.open(&resumed, second).unwrap(), (SESSION.to_vec(), first));
        parent.renew(third, third).unwrap();
        assert!(tickets.open(&resumed, third).is_none());
    }

    #[test]
    fn a_connection_goes_on_from_what_it_opened() {
        let parent = TicketKeysWriter::create().unwrap();
        let tickets = instance(&parent, b"certificate");
        let first = TicketPeriod::now();
        let connection = tickets.for_connection();
        let old = tickets.seal(SESSION, first.before(), first).unwrap();
        assert_eq!(connection.decrypt(&old).unwrap(), SESSION);
        let ticket = connection.encrypt(SESSION).unwrap();
        assert_eq!(tickets.open(&ticket, first).unwrap().1, first.before());
        let ticket = tickets.for_connection().encrypt(SESSION).unwrap();
        assert_eq!(tickets.open(&ticket, first).unwrap().1, first);
    }

    #[test]
    fn without_a_key_there_are_no_tickets() {
        let parent = TicketKeysWriter::create().unwrap();
        let connection = instance(&parent, b"certificate").for_connection();
        assert!(connection.encrypt(SESSION).is_some());
        drop(parent);
        assert!(connection.encrypt(SESSION).is_none());
    }

    proptest! {
        #[test]
        fn what_nobody_made_is_no_ticket(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let parent = TicketKeysWriter::create().unwrap();
            let tickets = instance(&parent, b"certificate");
            let name = tickets.keys.key(TicketPeriod::now()).unwrap().name;
            let connection = tickets.for_connection();
            prop_assert!(connection.decrypt(&bytes).is_none());
            prop_assert!(connection.decrypt(&[&name[..], &bytes].concat()).is_none());
        }

        #[test]
        fn an_altered_ticket_is_none(index: prop::sample::Index, flipped in 1u8..) {
            let parent = TicketKeysWriter::create().unwrap();
            let connection = instance(&parent, b"certificate").for_connection();
            let mut ticket = connection.encrypt(SESSION).unwrap();
            let index = index.index(ticket.len());
            prop_assert!(connection.decrypt(&ticket[..index]).is_none());
            prop_assert!(connection.decrypt(&[&ticket[..], &[flipped]].concat()).is_none());
            ticket[index] ^= flipped;
            prop_assert!(connection.decrypt(&ticket).is_none());
        }
    }
}

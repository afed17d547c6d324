//! Session tickets that every instance of a function can open, made with keys that their parent shares and renews.
//!
//! A ticket names its key and has a random salt, from which and the key its own AEAD key is derived: nothing is used twice,
//! however many instances make tickets, and none can be told to follow another. The function's certificate is part of the
//! derivation, so that a session does not outlive the certificate that its client has seen.
use std::{fmt, io, os::fd::OwnedFd};

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

    fn seal(&self, plain: &[u8], now: TicketPeriod) -> Option<Vec<u8>> {
        let key = self.keys.key(now)?;
        let mut header = [0; HEADER_BYTES];
        let (name, salt) = header.split_at_mut(TICKET_NAME_BYTES);
        name.copy_from_slice(&key.name);
        SystemRandom::new().fill(salt).ok()?;
        let mut body = Zeroizing::new(plain.to_vec());
        let tag = self
            .derive(&key, &header)?
            .seal_in_place_separate_tag(nonce(), Aad::from(header), &mut body)
            .ok()?;
        Some([&header, &body[..], tag.as_ref()].concat())
    }

    fn open(&self, ticket: &[u8], now: TicketPeriod) -> Option<Vec<u8>> {
        if ticket.len() > TICKET_BYTES_MAX {
            return None;
        }
        let (header, body) = ticket.split_first_chunk::<HEADER_BYTES>()?;
        let periods = [now, now.before()].into_iter();
        let key =
            periods.filter_map(|period| self.keys.key(period)).find(|key| header.starts_with(&key.name))?;
        let mut body = Zeroizing::new(body.to_vec());
        let plain = self.derive(&key, header)?.open_in_place(nonce(), Aad::from(*header), &mut body).ok()?;
        Some(plain.to_vec())
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

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        TICKET_PERIOD.as_secs() as u32
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.seal(plain, TicketPeriod::now())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.open(ticket, TicketPeriod::now())
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use handoff::TicketKeysWriter;
    use proptest::prelude::*;

    use super::*;

    const SESSION: &[u8] = b"what a server would have to remember";

    fn instance(parent: &TicketKeysWriter, certificate: &[u8]) -> Tickets {
        let memory = parent.as_fd().try_clone_to_owned().unwrap();
        Tickets::new(memory, &CertificateDer::from(certificate)).unwrap()
    }

    #[test]
    fn every_instance_with_the_same_certificate_opens_a_ticket() {
        let parent = TicketKeysWriter::create().unwrap();
        let [one, two] = [(); 2].map(|()| instance(&parent, b"certificate"));
        let ticket = one.encrypt(SESSION).unwrap();
        assert_eq!(two.decrypt(&ticket).unwrap(), SESSION);
        assert_eq!(one.decrypt(&ticket).unwrap(), SESSION);
        assert!(instance(&parent, b"another").decrypt(&ticket).is_none());
        let stranger = TicketKeysWriter::create().unwrap();
        assert!(instance(&stranger, b"certificate").decrypt(&ticket).is_none());
        // Nobody can tell that two were made by one.
        let again = one.encrypt(SESSION).unwrap();
        assert_ne!(ticket[TICKET_NAME_BYTES..], again[TICKET_NAME_BYTES..]);
    }

    #[test]
    fn a_ticket_is_good_in_its_period_and_the_next_one() {
        let parent = TicketKeysWriter::create().unwrap();
        let tickets = instance(&parent, b"certificate");
        let first = TicketPeriod::now();
        let [second, third] = [1, 2].map(|later| TicketPeriod(first.0 + later));
        let ticket = tickets.seal(SESSION, first).unwrap();
        parent.renew(second).unwrap();
        assert_eq!(tickets.open(&ticket, second).unwrap(), SESSION);
        let newer = tickets.seal(SESSION, second).unwrap();
        // Whether or not the parent has wiped the key yet.
        assert!(tickets.open(&ticket, third).is_none());
        parent.renew(third).unwrap();
        assert!(tickets.open(&ticket, third).is_none() && tickets.open(&ticket, second).is_none());
        assert_eq!(tickets.open(&newer, third).unwrap(), SESSION);
    }

    #[test]
    fn without_a_key_there_are_no_tickets() {
        let parent = TicketKeysWriter::create().unwrap();
        let tickets = instance(&parent, b"certificate");
        let later = TicketPeriod(TicketPeriod::now().0 + 2);
        assert!(tickets.seal(SESSION, later).is_none());
        drop(parent);
        assert!(tickets.encrypt(SESSION).is_none());
    }

    proptest! {
        #[test]
        fn what_nobody_made_is_no_ticket(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let parent = TicketKeysWriter::create().unwrap();
            let tickets = instance(&parent, b"certificate");
            prop_assert!(tickets.decrypt(&bytes).is_none());
            let name = tickets.keys.key(TicketPeriod::now()).unwrap().name;
            prop_assert!(tickets.decrypt(&[&name[..], &bytes].concat()).is_none());
        }

        #[test]
        fn an_altered_ticket_is_none(index: prop::sample::Index, flipped in 1u8..) {
            let parent = TicketKeysWriter::create().unwrap();
            let tickets = instance(&parent, b"certificate");
            let mut ticket = tickets.encrypt(SESSION).unwrap();
            let index = index.index(ticket.len());
            ticket[index] ^= flipped;
            prop_assert!(tickets.decrypt(&ticket).is_none());
            prop_assert!(tickets.decrypt(&ticket[..ticket.len() - 1]).is_none());
        }
    }
}

//! The record layer of an established session, TLS 1.2 or 1.3, without any I/O.

use std::io::IoSlice;
use std::ops::Range;

use ring::aead::{Aad, NONCE_LEN, Nonce};
use rustls::AlertDescription;

use super::fault::Fault;
use super::message::{Message, Partial};
use super::secrets::{Aead, CipherKey, Traffic, Version};

pub(super) const HEADER_BYTES: usize = 5;

/// The longest content of a record (RFC 8446 §5.1).
pub(super) const FRAGMENT_BYTES_MAX: usize = 1 << 14;

/// The longest record of either version on the wire (RFC 5246 §6.2.3 allows more expansion than RFC 8446 §5.2).
pub(super) const RECORD_BYTES_MAX: usize = HEADER_BYTES + FRAGMENT_BYTES_MAX + EXPANSION_BYTES_MAX_TLS12;

const EXPANSION_BYTES_MAX_TLS12: usize = 2048;
const EXPANSION_BYTES_MAX_TLS13: usize = 256;

/// What a record of ours needs beside its content: header, explicit nonce, content type and tag.
const OVERHEAD_BYTES_MAX: usize = HEADER_BYTES + EXPLICIT_NONCE_BYTES + 1 + TAG_BYTES;

/// AES-GCM in TLS 1.2 sends half of its nonce (RFC 5288 §3).
const EXPLICIT_NONCE_BYTES: usize = 8;

const TAG_BYTES: usize = 16;

/// Empty and padding-only records cost their sender nothing and us a decryption each; rustls tolerates as many.
pub(super) const EMPTY_RECORDS_MAX: u8 = 32;

/// Warnings (and TLS 1.2 renegotiation attempts, which are answered by one) in a connection's life, as BoringSSL.
pub(super) const WARNINGS_MAX: u8 = 4;

/// KeyUpdates without any data between them, as BoringSSL.
pub(super) const KEY_UPDATES_MAX: u8 = 32;

/// Longer copies are left to the processor by the C library, and some take many times as long for it where source and
/// destination aren't aligned alike. Behind a record's header nothing is aligned.
pub(super) const COPY_BYTES_MAX: usize = 1024;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// RFC 8446 §4.6.3.
const KEY_UPDATE_NOT_REQUESTED: [u8; 5] = [24, 0, 0, 1, 0];

/// All of a session that outlives a process: what `RecordLayer` is, without the ciphers made of it.
pub struct Session {
    pub(super) version: Version,
    pub(super) aead: Aead,
    pub(super) transmit: Traffic,
    pub(super) receive: Traffic,
    pub(super) counters: Counters,
    pub(super) message: Partial,
    /// The peer sent close_notify.
    pub(super) peer_closed: bool,
}

/// What the peer did that is allowed, but not without end.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) empty_records: u8,
    pub(super) warnings: u8,
    pub(super) key_updates: u8,
}

pub(super) struct RecordLayer {
    session: Session,
    sealing: CipherKey,
    opening: CipherKey,
    owed: Owed,
}

/// Answers that the peer's messages ask for, not sealed yet. Several requests are settled by one answer.
#[derive(Default)]
struct Owed {
    key_update: bool,
    no_renegotiation: bool,
}

/// What the bytes at the front of the input are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Not a whole record yet; it ends at this length at the earliest.
    Incomplete {
        record_bytes: usize,
    },
    /// A record of this length; its content lies, decrypted, within it.
    Data {
        record_bytes: usize,
        content: Range<usize>,
    },
    /// A record that asks nothing of the reader.
    Control {
        record_bytes: usize,
    },
    CloseNotify {
        record_bytes: usize,
    },
}

impl RecordLayer {
    pub(super) fn new(session: Session) -> Self {
        Self {
            sealing: CipherKey::new(session.aead, &session.transmit.keys),
            opening: CipherKey::new(session.aead, &session.receive.keys),
            owed: Owed::default(),
            session,
        }
    }

    /// What is owed must have been settled: the answer can't be sealed elsewhere.
    pub(super) fn into_session(self) -> Session {
        self.session
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn owes(&self) -> bool {
        self.owed.key_update || self.owed.no_renegotiation
    }

    /// Opens the record at the front of `input` in place. After an error, neither direction may be used but for the
    /// alert.
    pub(super) fn open(&mut self, input: &mut [u8]) -> Result<Opened, Fault> {
        let Some(header) = input.first_chunk::<HEADER_BYTES>() else {
            return Ok(Opened::Incomplete { record_bytes: HEADER_BYTES });
        };
        let record_bytes = HEADER_BYTES + self.body_bytes(*header)?;
        let Some(record) = input.get_mut(..record_bytes) else {
            return Ok(Opened::Incomplete { record_bytes });
        };
        let (kind, content) = self.decrypt(record)?;
        self.take(kind, record, content)
    }

    /// Refuses by the header alone what isn't a record of an established session.
    fn body_bytes(&self, [kind, major, _, high, low]: [u8; HEADER_BYTES]) -> Result<usize, Fault> {
        let (known, expansion_bytes_max) = match self.session.version {
            Version::Tls12 => {
                (matches!(kind, ALERT | HANDSHAKE | APPLICATION_DATA), EXPANSION_BYTES_MAX_TLS12)
            }
            Version::Tls13 => (kind == APPLICATION_DATA, EXPANSION_BYTES_MAX_TLS13),
        };
        if !known {
            return Err(Fault::UnexpectedMessage("a record's type"));
        }
        if major != 3 {
            return Err(Fault::Decode("a record's version"));
        }
        let body_bytes = usize::from(u16::from_be_bytes([high, low]));
        if body_bytes > FRAGMENT_BYTES_MAX + expansion_bytes_max {
            return Err(Fault::RecordOverflow);
        }
        Ok(body_bytes)
    }

    /// The content's true type and where it lies in the record.
    fn decrypt(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), Fault> {
        let sequence = self.session.receive.sequence;
        let next = sequence.checked_add(1).ok_or(Fault::KeysExhausted)?;
        let header = record_header(record);
        let keys = &self.session.receive.keys;
        let (kind, content) = match self.session.version {
            Version::Tls13 => {
                let nonce = Nonce::assume_unique_for_key(keys.nonce(sequence));
                let inner = self
                    .opening
                    .get()
                    .open_in_place(nonce, Aad::from(header), &mut record[HEADER_BYTES..])
                    .map_err(|_| Fault::BadRecordMac)?;
                if inner.len() > FRAGMENT_BYTES_MAX + 1 {
                    return Err(Fault::RecordOverflow);
                }
                let kind_at = inner
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .ok_or(Fault::UnexpectedMessage("a record without a content type"))?;
                (inner[kind_at], HEADER_BYTES..HEADER_BYTES + kind_at)
            }
            Version::Tls12 => {
                let (nonce, body_at) = match self.session.aead {
                    Aead::Chacha20Poly1305 => (keys.nonce(sequence), HEADER_BYTES),
                    Aead::Aes128Gcm | Aead::Aes256Gcm => {
                        let explicit: [u8; EXPLICIT_NONCE_BYTES] =
                            *record[HEADER_BYTES..].first_chunk().ok_or(Fault::BadRecordMac)?;
                        let mut nonce = *keys.iv;
                        nonce[NONCE_LEN - EXPLICIT_NONCE_BYTES..].copy_from_slice(&explicit);
                        (nonce, HEADER_BYTES + EXPLICIT_NONCE_BYTES)
                    }
                };
                let content_bytes =
                    (record.len() - body_at).checked_sub(TAG_BYTES).ok_or(Fault::BadRecordMac)?;
                if content_bytes > FRAGMENT_BYTES_MAX {
                    return Err(Fault::RecordOverflow);
                }
                let aad = tls12_aad(sequence, header, content_bytes);
                self.opening
                    .get()
                    .open_in_place(
                        Nonce::assume_unique_for_key(nonce),
                        Aad::from(aad),
                        &mut record[body_at..],
                    )
                    .map_err(|_| Fault::BadRecordMac)?;
                (header[0], body_at..body_at + content_bytes)
            }
        };
        self.session.receive.sequence = next;
        Ok((kind, content))
    }

    fn take(&mut self, kind: u8, record: &[u8], content: Range<usize>) -> Result<Opened, Fault> {
        let record_bytes = record.len();
        // RFC 8446 §5.1: nothing may come between the parts of a handshake message.
        if kind != HANDSHAKE && self.session.version == Version::Tls13 && !self.session.message.is_none() {
            return Err(Fault::UnexpectedMessage("a record amid a handshake message"));
        }
        match kind {
            APPLICATION_DATA if content.is_empty() => {
                count(&mut self.session.counters.empty_records, EMPTY_RECORDS_MAX, "empty records")?;
                Ok(Opened::Control { record_bytes })
            }
            APPLICATION_DATA => {
                self.session.counters.empty_records = 0;
                self.session.counters.key_updates = 0;
                Ok(Opened::Data { record_bytes, content })
            }
            ALERT => self.take_alert(&record[content], record_bytes),
            HANDSHAKE => {
                self.take_handshake(&record[content])?;
                Ok(Opened::Control { record_bytes })
            }
            _ => Err(Fault::UnexpectedMessage("a record's inner type")),
        }
    }

    fn take_alert(&mut self, content: &[u8], record_bytes: usize) -> Result<Opened, Fault> {
        let (level, description) = match *content {
            [level, description] => (level, description),
            [] => return Err(Fault::UnexpectedMessage("an empty alert record")),
            _ => return Err(Fault::Decode("an alert")),
        };
        let description = AlertDescription::from(description);
        if description == AlertDescription::CloseNotify {
            self.session.peer_closed = true;
            return Ok(Opened::CloseNotify { record_bytes });
        }
        let tolerated = match (self.session.version, level) {
            // The level means nothing in TLS 1.3, all alerts but these two are errors (RFC 8446 §6).
            (Version::Tls13, _) => description == AlertDescription::UserCanceled,
            (Version::Tls12, WARNING) => true,
            (Version::Tls12, FATAL) => false,
            (Version::Tls12, _) => return Err(Fault::IllegalParameter("an alert's level")),
        };
        if !tolerated {
            return Err(Fault::PeerAlert(description));
        }
        count(&mut self.session.counters.warnings, WARNINGS_MAX, "warnings")?;
        Ok(Opened::Control { record_bytes })
    }

    fn take_handshake(&mut self, mut content: &[u8]) -> Result<(), Fault> {
        if content.is_empty() {
            return Err(Fault::UnexpectedMessage("an empty handshake record"));
        }
        while let Some(message) = self.session.message.next(&mut content, self.session.version)? {
            match message {
                Message::KeyUpdate { requested } => {
                    // RFC 8446 §5.1: a key change and a record's end fall together.
                    if !content.is_empty() {
                        return Err(Fault::UnexpectedMessage("bytes after a KeyUpdate"));
                    }
                    count(&mut self.session.counters.key_updates, KEY_UPDATES_MAX, "KeyUpdates")?;
                    self.owed.key_update |= requested;
                    self.opening = renew(self.session.aead, &mut self.session.receive);
                }
                Message::Renegotiation => {
                    count(&mut self.session.counters.warnings, WARNINGS_MAX, "renegotiations")?;
                    self.owed.no_renegotiation = true;
                }
            }
        }
        Ok(())
    }

    /// Seals from the front of `input` into `output`, at most `bytes_max`, in as few records as possible; returns how
    /// much. What is owed goes first.
    pub(super) fn seal(
        &mut self,
        input: &[IoSlice<'_>],
        bytes_max: usize,
        output: &mut Vec<u8>,
    ) -> Result<usize, Fault> {
        self.settle(output);
        let total = input.iter().map(|slice| slice.len()).sum::<usize>().min(bytes_max);
        output.reserve(total + total.div_ceil(FRAGMENT_BYTES_MAX) * OVERHEAD_BYTES_MAX);
        let mut source = Gather { slices: input, offset: 0 };
        let mut sealed = 0;
        while sealed < total {
            if self.session.transmit.sequence >= self.session.aead.records_max() {
                match self.session.version {
                    Version::Tls13 => self.update_keys(output),
                    Version::Tls12 if sealed > 0 => break,
                    Version::Tls12 => return Err(Fault::KeysExhausted),
                }
            }
            let fragment_bytes = (total - sealed).min(FRAGMENT_BYTES_MAX);
            self.seal_record(APPLICATION_DATA, output, |output| source.copy(fragment_bytes, output));
            sealed += fragment_bytes;
        }
        Ok(sealed)
    }

    /// Seals the answers that are owed.
    pub(super) fn settle(&mut self, output: &mut Vec<u8>) {
        let owed = std::mem::take(&mut self.owed);
        if owed.no_renegotiation {
            self.alert(WARNING, AlertDescription::NoRenegotiation, output);
        }
        if owed.key_update {
            self.update_keys(output);
        }
    }

    pub(super) fn close_notify(&mut self, output: &mut Vec<u8>) {
        self.alert(WARNING, AlertDescription::CloseNotify, output);
    }

    /// The last record of a session that failed, if it deserves one.
    pub(super) fn fail(&mut self, fault: Fault, output: &mut Vec<u8>) {
        match fault.alert() {
            Some(AlertDescription::CloseNotify) => self.close_notify(output),
            Some(description) => self.alert(FATAL, description, output),
            None => {}
        }
    }

    /// Tells the peer of new keys and goes on with them. TLS 1.3 only.
    pub(super) fn update_keys(&mut self, output: &mut Vec<u8>) {
        self.seal_record(HANDSHAKE, output, |output| output.extend_from_slice(&KEY_UPDATE_NOT_REQUESTED));
        self.sealing = renew(self.session.aead, &mut self.session.transmit);
    }

    fn alert(&mut self, level: u8, description: AlertDescription, output: &mut Vec<u8>) {
        self.seal_record(ALERT, output, |output| output.extend_from_slice(&[level, description.into()]));
    }

    pub(super) fn seal_record(&mut self, kind: u8, output: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
        let Session { version, aead, transmit, .. } = &mut self.session;
        let nonce = transmit.keys.nonce(transmit.sequence);
        let explicit_nonce = *version == Version::Tls12 && *aead != Aead::Chacha20Poly1305;
        let outer_kind = if *version == Version::Tls13 { APPLICATION_DATA } else { kind };

        let header_at = output.len();
        output.extend_from_slice(&[outer_kind, 3, 3, 0, 0]);
        if explicit_nonce {
            output.extend_from_slice(&nonce[NONCE_LEN - EXPLICIT_NONCE_BYTES..]);
        }
        let body_at = output.len();
        content(output);
        let content_bytes = output.len() - body_at;
        if *version == Version::Tls13 {
            output.push(kind);
        }
        let length = (output.len() + TAG_BYTES - header_at - HEADER_BYTES) as u16;
        output[header_at + HEADER_BYTES - 2..header_at + HEADER_BYTES].copy_from_slice(&length.to_be_bytes());

        let nonce = Nonce::assume_unique_for_key(nonce);
        let header = record_header(&output[header_at..]);
        let body = &mut output[body_at..];
        let tag = match version {
            Version::Tls13 => self.sealing.get().seal_in_place_separate_tag(nonce, Aad::from(header), body),
            Version::Tls12 => {
                let aad = tls12_aad(transmit.sequence, header, content_bytes);
                self.sealing.get().seal_in_place_separate_tag(nonce, Aad::from(aad), body)
            }
        };
        output.extend_from_slice(tag.expect("a record is far below the cipher's longest input").as_ref());
        transmit.sequence += 1;
    }
}

fn count(counter: &mut u8, max: u8, what: &'static str) -> Result<(), Fault> {
    if *counter == max {
        return Err(Fault::TooMany(what));
    }
    *counter += 1;
    Ok(())
}

fn renew(aead: Aead, traffic: &mut Traffic) -> CipherKey {
    let secret = traffic.secret.as_ref().expect("a session of TLS 1.3 has its traffic secrets").next(aead);
    traffic.keys = secret.keys(aead);
    traffic.sequence = 0;
    traffic.secret = Some(secret);
    CipherKey::new(aead, &traffic.keys)
}

fn record_header(record: &[u8]) -> [u8; HEADER_BYTES] {
    *record.first_chunk().expect("a record begins with its header")
}

/// RFC 5246 §6.2.3.3: the sequence number, then the header with the length of the plaintext.
fn tls12_aad(sequence: u64, header: [u8; HEADER_BYTES], content_bytes: usize) -> [u8; 13] {
    let mut aad = [0; 13];
    aad[..8].copy_from_slice(&sequence.to_be_bytes());
    aad[8..11].copy_from_slice(&header[..3]);
    aad[11..].copy_from_slice(&(content_bytes as u16).to_be_bytes());
    aad
}

/// Reads slices as if they were one.
struct Gather<'a> {
    slices: &'a [IoSlice<'a>],
    offset: usize,
}

impl Gather<'_> {
    fn copy(&mut self, mut bytes: usize, output: &mut Vec<u8>) {
        while bytes > 0 {
            let rest = &self.slices[0][self.offset..];
            let taken = rest.len().min(bytes);
            rest[..taken].chunks(COPY_BYTES_MAX).for_each(|piece| output.extend_from_slice(piece));
            bytes -= taken;
            self.offset += taken;
            if self.offset == self.slices[0].len() {
                self.slices = &self.slices[1..];
                self.offset = 0;
            }
        }
    }
}

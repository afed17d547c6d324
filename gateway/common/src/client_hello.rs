//! The scanner of a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3): resumable after any byte, done at the SNI.
use crate::{
    Refusal,
    first_flight::Step,
    limits::{CLIENT_HELLO_BYTES, TLS_PLAINTEXT_BYTES},
    route::RouteKey,
};

const RECORD_HANDSHAKE: u8 = 22;
const VERSION_MAJOR: u8 = 3;
const MESSAGE_CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const NAME_TYPE_HOST: u8 = 0;

/// legacy_version and random.
const FIXED_FIELDS_BYTES: u32 = 2 + 32;
const SESSION_ID_BYTES: u32 = 32;

// The states are the hello's fields in their order; each takes the bytes that its comment names.
const MESSAGE_TYPE: u8 = 0;
const MESSAGE_LENGTH: u8 = 1; // 3
const SESSION_ID_LENGTH: u8 = 2; // 1
const CIPHER_SUITES_LENGTH: u8 = 3; // 2
const COMPRESSION_LENGTH: u8 = 4; // 1
const EXTENSIONS_LENGTH: u8 = 5; // 2
const EXTENSION_TYPE: u8 = 6; // 2
const EXTENSION_LENGTH: u8 = 7; // 2
const NAME_LIST_LENGTH: u8 = 8; // 2
const NAME_TYPE: u8 = 9; // 1
const NAME_LENGTH: u8 = 10; // 2
const NAME: u8 = 11; // as NAME_LENGTH says

/// Where in the record and in the hello the next byte stands.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct HelloScan {
    /// Bytes of the hello still to come by its own length.
    hello_left: u32,
    /// Bytes of the hello that need not be looked at.
    skip_left: u32,
    /// Bytes of the current record's fragment still to come.
    record_left: u16,
    /// The number being read, most significant byte first.
    number: u16,
    /// The server_name extension's length, or what of its name is still to come.
    name_left: u16,
    extension_is_server_name: u8,
    state: u8,
    /// Bytes read of the field that `state` names.
    field_bytes: u8,
    /// Bytes read of the record's header.
    header_bytes: u8,
    /// The upper byte of the record's length, once it was read.
    record_length_high: u8,
    reserved: u8,
}

impl HelloScan {
    pub const fn new() -> Self {
        Self {
            hello_left: 0,
            skip_left: 0,
            record_left: 0,
            number: 0,
            name_left: 0,
            extension_is_server_name: 0,
            state: MESSAGE_TYPE,
            field_bytes: 0,
            header_bytes: 0,
            record_length_high: 0,
            reserved: 0,
        }
    }

    /// Passes over what need not be looked at, of `available` bytes, and says how much that was.
    #[inline(always)]
    pub fn skip(&mut self, available: u32) -> u32 {
        let skipped = self.skip_left.min(u32::from(self.record_left)).min(available);
        self.skip_left -= skipped;
        self.hello_left -= skipped;
        self.record_left -= skipped as u16;
        skipped
    }

    #[inline(always)]
    pub fn step(&mut self, key: &mut RouteKey, byte: u8) -> Step {
        if self.record_left == 0 {
            return self.record_header(byte);
        }
        self.record_left -= 1;
        match self.state {
            MESSAGE_TYPE if byte == MESSAGE_CLIENT_HELLO => {
                self.state = MESSAGE_LENGTH;
                Step::More
            }
            MESSAGE_TYPE => Step::Refuse(Refusal::UnexpectedMessage),
            MESSAGE_LENGTH => self.message_length(byte),
            _ => self.hello(key, byte),
        }
    }

    #[inline(always)]
    fn record_header(&mut self, byte: u8) -> Step {
        let position = self.header_bytes;
        self.header_bytes += 1;
        match position {
            0 if byte == RECORD_HANDSHAKE => Step::More,
            0 if self.state == MESSAGE_TYPE && byte.is_ascii_alphabetic() => {
                Step::Refuse(Refusal::OtherProtocol)
            }
            0 => Step::Refuse(Refusal::UnexpectedMessage),
            1 if byte == VERSION_MAJOR => Step::More,
            1 => Step::Refuse(Refusal::Malformed),
            2 => Step::More,
            3 => {
                self.record_length_high = byte;
                Step::More
            }
            _ => {
                self.header_bytes = 0;
                self.record_left = (u16::from(self.record_length_high) << 8) | u16::from(byte);
                if self.record_left == 0 || self.record_left > TLS_PLAINTEXT_BYTES {
                    return Step::Refuse(Refusal::Malformed);
                }
                Step::More
            }
        }
    }

    #[inline(always)]
    fn message_length(&mut self, byte: u8) -> Step {
        self.hello_left = (self.hello_left << 8) | u32::from(byte);
        self.field_bytes += 1;
        if self.field_bytes < 3 {
            return Step::More;
        }
        if self.hello_left > CLIENT_HELLO_BYTES {
            return Step::Refuse(Refusal::TooLong);
        }
        self.enter(SESSION_ID_LENGTH);
        self.pass_over(FIXED_FIELDS_BYTES)
    }

    /// A byte of the hello's body, after legacy_version and random.
    #[inline(always)]
    fn hello(&mut self, key: &mut RouteKey, byte: u8) -> Step {
        if self.hello_left == 0 {
            return Step::Refuse(Refusal::Malformed);
        }
        self.hello_left -= 1;
        if self.state == NAME {
            return self.name(key, byte);
        }
        self.number = (self.number << 8) | u16::from(byte);
        self.field_bytes += 1;
        if self.field_bytes < field_width(self.state) {
            return self.unless_ended(Step::More);
        }
        let number = self.number;
        let step = self.field(number);
        self.field_bytes = 0;
        self.number = 0;
        step
    }

    /// A complete number; the state goes on to the field behind it.
    #[inline(always)]
    fn field(&mut self, number: u16) -> Step {
        let length = u32::from(number);
        match self.state {
            SESSION_ID_LENGTH if length > SESSION_ID_BYTES => Step::Refuse(Refusal::Malformed),
            SESSION_ID_LENGTH => {
                self.state = CIPHER_SUITES_LENGTH;
                self.pass_over(length)
            }
            CIPHER_SUITES_LENGTH if length == 0 || length % 2 != 0 => Step::Refuse(Refusal::Malformed),
            CIPHER_SUITES_LENGTH => {
                self.state = COMPRESSION_LENGTH;
                self.pass_over(length)
            }
            COMPRESSION_LENGTH if length == 0 || length > self.hello_left => Step::Refuse(Refusal::Malformed),
            // A hello may end here, without extensions and so without a name.
            COMPRESSION_LENGTH if length == self.hello_left => Step::Refuse(Refusal::NoFunction),
            COMPRESSION_LENGTH => {
                self.state = EXTENSIONS_LENGTH;
                self.pass_over(length)
            }
            EXTENSIONS_LENGTH if length != self.hello_left => Step::Refuse(Refusal::Malformed),
            EXTENSIONS_LENGTH => self.next_extension(0),
            EXTENSION_TYPE => {
                self.extension_is_server_name = u8::from(number == EXTENSION_SERVER_NAME);
                self.state = EXTENSION_LENGTH;
                self.unless_ended(Step::More)
            }
            EXTENSION_LENGTH if length > self.hello_left => Step::Refuse(Refusal::Malformed),
            EXTENSION_LENGTH if self.extension_is_server_name == 0 => self.next_extension(length),
            EXTENSION_LENGTH => self.server_name(number),
            NAME_LIST_LENGTH => self.name_list(number),
            NAME_TYPE if number != u16::from(NAME_TYPE_HOST) => Step::Refuse(Refusal::IllegalParameter),
            NAME_TYPE => {
                self.state = NAME_LENGTH;
                Step::More
            }
            _ => self.name_length(number),
        }
    }

    #[inline(always)]
    fn next_extension(&mut self, length: u32) -> Step {
        self.state = EXTENSION_TYPE;
        if length == self.hello_left {
            return Step::Refuse(Refusal::NoFunction);
        }
        self.pass_over(length)
    }

    #[inline(always)]
    fn server_name(&mut self, length: u16) -> Step {
        match length {
            0 => Step::Refuse(Refusal::NoFunction),
            1 => Step::Refuse(Refusal::Malformed),
            _ => {
                self.name_left = length - 2;
                self.state = NAME_LIST_LENGTH;
                Step::More
            }
        }
    }

    #[inline(always)]
    fn name_list(&mut self, length: u16) -> Step {
        match length {
            _ if length != self.name_left => Step::Refuse(Refusal::Malformed),
            0 => Step::Refuse(Refusal::NoFunction),
            1 | 2 => Step::Refuse(Refusal::Malformed),
            _ => {
                self.name_left = length - 3;
                self.state = NAME_TYPE;
                Step::More
            }
        }
    }

    #[inline(always)]
    fn name_length(&mut self, length: u16) -> Step {
        if length > self.name_left {
            Step::Refuse(Refusal::Malformed)
        } else if length < self.name_left {
            // A second name, and RFC 6066 allows one of a type; no type but this is defined.
            Step::Refuse(Refusal::IllegalParameter)
        } else if length == 0 {
            Step::Refuse(Refusal::NoFunction)
        } else {
            self.state = NAME;
            Step::More
        }
    }

    #[inline(always)]
    fn name(&mut self, key: &mut RouteKey, byte: u8) -> Step {
        self.name_left = self.name_left.wrapping_sub(1);
        if !key.push(byte.to_ascii_lowercase()) {
            return Step::Refuse(Refusal::NoFunction);
        }
        if self.name_left == 0 { Step::Name } else { Step::More }
    }

    #[inline(always)]
    fn enter(&mut self, state: u8) {
        self.state = state;
        self.field_bytes = 0;
    }

    /// Skips `length` bytes that must be followed by another field.
    #[inline(always)]
    fn pass_over(&mut self, length: u32) -> Step {
        self.skip_left = length;
        if length >= self.hello_left { Step::Refuse(Refusal::Malformed) } else { Step::More }
    }

    /// In the middle of a field the hello must not end.
    #[inline(always)]
    fn unless_ended(&self, step: Step) -> Step {
        if self.hello_left == 0 { Step::Refuse(Refusal::Malformed) } else { step }
    }
}

impl Default for HelloScan {
    fn default() -> Self {
        Self::new()
    }
}

#[inline(always)]
const fn field_width(state: u8) -> u8 {
    match state {
        SESSION_ID_LENGTH | COMPRESSION_LENGTH | NAME_TYPE => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Protocol, first_flight::FirstFlight};

    fn scan(bytes: &[u8]) -> Result<String, Step> {
        let mut flight = FirstFlight::new(0, Protocol::Https);
        match flight.feed(bytes) {
            Step::Name => Ok(String::from_utf8(flight.key.name().to_vec()).unwrap()),
            other => Err(other),
        }
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), body].concat()
    }

    fn server_name(name: &[u8]) -> Vec<u8> {
        let length = name.len() as u16;
        let entry = [&[0][..], &length.to_be_bytes(), name].concat();
        extension(0, &[&(length + 3).to_be_bytes()[..], &entry].concat())
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(32);
        body.extend([9; 32]);
        body.extend([0, 4, 0x13, 1, 0x13, 2, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1];
        message.extend(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend(body);
        message
    }

    fn records(message: &[u8], fragment_bytes: usize) -> Vec<u8> {
        message
            .chunks(fragment_bytes)
            .flat_map(|part| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat())
            .collect()
    }

    #[test]
    fn the_name_is_found_in_any_record_fragmentation() {
        let hello = message(
            &[extension(0x0a0a, &[0]), server_name(b"Echo.FAAS.local"), extension(43, &[2, 3, 4])].concat(),
        );
        for fragment_bytes in 1..=hello.len() {
            assert_eq!(scan(&records(&hello, fragment_bytes)), Ok("echo.faas.local".into()));
        }
    }

    #[test]
    fn every_cut_resumes() {
        let hello =
            records(&message(&[extension(51, &[0; 1200]), server_name(b"echo.faas.local")].concat()), 700);
        let complete = (0..=hello.len()).find(|&end| scan(&hello[..end]).is_ok()).unwrap();
        for cut in 0..=complete {
            let mut flight = FirstFlight::new(0, Protocol::Https);
            let first = flight.feed(&hello[..cut]);
            if cut < complete {
                assert_eq!(first, Step::More, "{cut}");
                assert_eq!(flight.feed(&hello[cut..]), Step::Name);
            }
            assert_eq!(flight.key.name(), b"echo.faas.local");
        }
    }

    #[test]
    fn a_name_behind_fourteen_kibibytes_is_found() {
        let hello = message(&[extension(21, &[0; 14 * 1024]), server_name(b"echo.faas.local")].concat());
        assert_eq!(scan(&records(&hello, 1 << 14)), Ok("echo.faas.local".into()));
    }

    #[test]
    fn what_names_no_host_is_no_function() {
        for extensions in [
            extension(43, &[2, 3, 4]),
            extension(0, &[]),
            extension(0, &[0, 0]),
            extension(0, &[0, 3, 0, 0, 0]),
            server_name(&[b'a'; 125]),
        ] {
            assert_eq!(scan(&records(&message(&extensions), 16384)), Err(Step::Refuse(Refusal::NoFunction)));
        }
        let mut bare = message(&[]);
        bare.truncate(bare.len() - 2);
        bare[3] -= 2;
        assert_eq!(scan(&records(&bare, 16384)), Err(Step::Refuse(Refusal::NoFunction)));
    }

    #[test]
    fn broken_hellos_are_refused() {
        let refused =
            |bytes: &[u8], refusal| assert_eq!(scan(bytes), Err(Step::Refuse(refusal)), "{bytes:?}");
        refused(b"GET / HTTP/1.1\r\n", Refusal::OtherProtocol);
        refused(&[0x80, 0x2e, 1, 0, 2], Refusal::UnexpectedMessage);
        refused(&[20, 3, 3, 0, 1, 1], Refusal::UnexpectedMessage);
        refused(&[22, 2, 0], Refusal::Malformed);
        refused(&[22, 3, 1, 0, 0], Refusal::Malformed);
        refused(&[22, 3, 1, 0x40, 1], Refusal::Malformed);
        refused(&[22, 3, 1, 0, 4, 2], Refusal::UnexpectedMessage);
        refused(&[22, 3, 1, 0, 4, 1, 0, 0x40, 1], Refusal::TooLong);
        refused(&[22, 3, 1, 0, 4, 1, 0, 0, 0], Refusal::Malformed);
        let whole = |extensions: &[u8]| records(&message(extensions), 16384);
        let two_names = [&[0, 8][..], &[0, 0, 1, b'a'], &[0, 0, 1, b'b']].concat();
        refused(&whole(&extension(0, &two_names)), Refusal::IllegalParameter);
        refused(&whole(&extension(0, &[0, 4, 1, 0, 1, b'a'])), Refusal::IllegalParameter);
        refused(&whole(&extension(0, &[0, 5, 0, 0, 1, b'a'])), Refusal::Malformed);
        refused(&whole(&extension(0, &[0, 4, 0, 0, 2, b'a'])), Refusal::Malformed);
        refused(&whole(&[0, 0, 0, 9, 0]), Refusal::Malformed);
        refused(&whole(&[0, 0, 0]), Refusal::Malformed);
        refused(&whole(&[0x0a]), Refusal::Malformed);
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_cuts_never_matter(
            prefix in 0usize..200,
            noise in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
            cut in 0usize..600,
        ) {
            let hello = records(&message(&server_name(b"echo.faas.local")), 60);
            let mut bytes = hello[..prefix.min(hello.len())].to_vec();
            bytes.extend(noise);
            for protocol in [Protocol::Http, Protocol::Https] {
                let mut whole = FirstFlight::new(0, protocol);
                let expected = whole.feed(&bytes);
                let mut parts = FirstFlight::new(0, protocol);
                let (first, second) = bytes.split_at(cut.min(bytes.len()));
                let step = match parts.feed(first) {
                    Step::More => parts.feed(second),
                    known => known,
                };
                proptest::prop_assert_eq!(step, expected);
                proptest::prop_assert!(parts.key == whole.key);
            }
        }
    }
}

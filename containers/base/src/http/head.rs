//! A request's head: parsed where it lies in the buffer, checked, and turned into a request once it is ours.
use std::mem::MaybeUninit;

use bytes::Bytes;
use common::{
    limits::{AUTHORITY_BYTES, METHOD_BYTES},
    target,
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{CONTENT_LENGTH, HOST},
    uri::PathAndQuery,
};

use super::{
    limits::{FIELDS, HEAD_BYTES, REQUEST_LINE_BYTES},
    reject::Reject,
};

/// A head whose empty line is there; what it says borrows from the bytes it was parsed from.
pub struct Head<'h, 'b> {
    pub method: Method,
    pub target: &'b [u8],
    pub version: Version,
    pub host: Option<&'b [u8]>,
    pub framing: Framing,
    pub keep_alive: bool,
    pub expects_continue: bool,
    /// The protocol may change after the answer.
    pub may_upgrade: bool,
    pub takes_trailers: bool,
    fields: &'h [httparse::Header<'b>],
}

/// Where a request's body ends (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked,
}

/// Finds a head's end in input that grows, looking at each byte once.
#[derive(Default)]
pub struct HeadScan {
    scanned: usize,
    /// Where the current line begins.
    line: usize,
    /// How much input was last parsed in vain.
    parsed: usize,
}

impl HeadScan {
    /// The length of the head once all of it is there; what is certainly wrong is an error at once.
    pub fn next(&mut self, input: &[u8]) -> Result<Option<usize>, Reject> {
        let length = self.scan(input)?;
        // Parsing an incomplete head finds garbage early; doing it at doubled lengths only keeps it linear.
        if length.is_none() && input.len() >= 2 * self.parsed {
            self.parsed = input.len();
            let mut fields = [const { MaybeUninit::uninit() }; FIELDS];
            let parsed = httparse::Request::new(&mut []).parse_with_uninit_headers(input, &mut fields);
            match parsed {
                // Which version is asked for, and so the answer, shows at the end of the line.
                Err(httparse::Error::Version) if self.line == 0 => {}
                Err(error) => return Err(rejection(error, input)),
                Ok(_) => {}
            }
        }
        Ok(length)
    }

    fn scan(&mut self, input: &[u8]) -> Result<Option<usize>, Reject> {
        for offset in memchr::memchr_iter(b'\n', &input[self.scanned..]) {
            let line_feed = self.scanned + offset;
            if line_feed == 0 || input[line_feed - 1] != b'\r' {
                return Err(Reject::bad_request("A line of the head doesn't end with CR LF."));
            }
            let first_line = self.line == 0;
            if first_line && line_feed > REQUEST_LINE_BYTES {
                return Err(Reject::REQUEST_LINE_TOO_LONG);
            }
            if line_feed >= HEAD_BYTES {
                return Err(Reject::HEAD_TOO_LONG);
            }
            if !first_line && line_feed - 1 == self.line {
                return Ok(Some(line_feed + 1));
            }
            self.line = line_feed + 1;
        }
        self.scanned = input.len();
        if self.line == 0 && input.len() > REQUEST_LINE_BYTES {
            return Err(Reject::REQUEST_LINE_TOO_LONG);
        }
        if input.len() >= HEAD_BYTES {
            return Err(Reject::HEAD_TOO_LONG);
        }
        Ok(None)
    }
}

/// Room for a head's fields on the stack.
pub struct Fields<'b>([MaybeUninit<httparse::Header<'b>>; FIELDS]);

impl Fields<'_> {
    pub const fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; FIELDS])
    }
}

impl<'h, 'b> Head<'h, 'b> {
    /// Parses exactly one whole head.
    pub fn parse(bytes: &'b [u8], fields: &'h mut Fields<'b>) -> Result<Self, Reject> {
        let mut parsed = httparse::Request::new(&mut []);
        let status = parsed
            .parse_with_uninit_headers(bytes, &mut fields.0)
            .map_err(|error| rejection(error, bytes))?;
        let (httparse::Status::Complete(length), Some(method), Some(path), Some(minor)) =
            (status, parsed.method, parsed.path, parsed.version)
        else {
            return Err(Reject::bad_request("The head is malformed."));
        };
        // Two opinions on where a head ends would be two opinions on where the next request begins.
        if length != bytes.len() {
            return Err(Reject::bad_request("The head is malformed."));
        }
        if method.len() > usize::from(METHOD_BYTES) {
            return Err(Reject::bad_request("The method is too long."));
        }
        match target::authority(path.as_bytes()) {
            Some(authority) if authority.len() > usize::from(AUTHORITY_BYTES) => {
                return Err(Reject::AUTHORITY_TOO_LONG);
            }
            // Userinfo, which no authority of an HTTP request has (RFC 9110 §4.2.4), would hide whose host it is.
            Some(authority) if !is_authority(authority) => return Err(malformed_target(())),
            _ => {}
        }
        let version = if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
        let facts = Facts::gather(parsed.headers)?;
        let framing = facts.framing(version)?;
        Ok(Self {
            method: Method::from_bytes(method.as_bytes())
                .map_err(|_| Reject::bad_request("The method is not a token."))?,
            target: path.as_bytes(),
            version,
            host: facts.host(version)?,
            framing,
            keep_alive: facts.keep_alive(version),
            expects_continue: facts.expects_continue(version)? && framing != Framing::Length(0),
            may_upgrade: facts.may_upgrade(version) && framing == Framing::Length(0),
            takes_trailers: facts.takes_trailers,
            fields: parsed.headers,
        })
    }

    /// The request for the handler, whose part of the target begins at `path`.
    ///
    /// `bytes` are those that the head was parsed from; the request's values share them.
    pub fn into_request<B>(self, bytes: &Bytes, path: usize, body: B) -> Result<Request<B>, Reject> {
        let target = bytes.slice_ref(self.target);
        let original = Uri::from_maybe_shared(target.clone()).map_err(malformed_target)?;
        if self.target == b"*" && self.method != Method::OPTIONS {
            return Err(Reject::bad_request("Only OPTIONS has the target *."));
        }
        let mut request = Request::new(body);
        *request.uri_mut() = match &self.target[path..] {
            _ if path == 0 => origin_form(&original),
            [b'/', ..] => path_and_query(target.slice(path..))?,
            rest @ [b'?', ..] => path_and_query(Bytes::from([b"/", rest].concat()))?,
            _ => Uri::default(),
        };
        *request.method_mut() = self.method;
        *request.version_mut() = self.version;
        *request.headers_mut() = headers(bytes, self.fields)?;
        if let Some(authority) = original.authority() {
            // RFC 9112 §3.2.2: what Host says gives way to the target.
            let host = HeaderValue::from_str(authority.as_str()).map_err(|_| malformed_target(()))?;
            request.headers_mut().insert(HOST, host);
        }
        request.extensions_mut().insert(OriginalUri(original));
        Ok(request)
    }
}

fn rejection(error: httparse::Error, input: &[u8]) -> Reject {
    match error {
        httparse::Error::TooManyHeaders => Reject::TOO_MANY_FIELDS,
        httparse::Error::Version if names_a_version(input) => Reject::VERSION,
        httparse::Error::Version => Reject::bad_request("The request line has no HTTP version."),
        httparse::Error::HeaderName => Reject::bad_request("A header field's name is malformed."),
        httparse::Error::HeaderValue => Reject::bad_request("A header field's value is malformed."),
        _ => Reject::bad_request("The request line is malformed."),
    }
}

/// The request line's third word looks like `HTTP/2.0`.
fn names_a_version(input: &[u8]) -> bool {
    let line = input.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let version = line.splitn(3, |&byte| byte == b' ').nth(2).unwrap_or_default();
    matches!(version, [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
        if major.is_ascii_digit() && minor.is_ascii_digit())
}

/// What the fields say about the message itself.
#[derive(Default)]
struct Facts<'a> {
    host: Option<&'a [u8]>,
    second_host: bool,
    length: Option<u64>,
    codings: Codings,
    closes: bool,
    keeps_alive: bool,
    upgrades: bool,
    upgrade_named: bool,
    takes_trailers: bool,
    expectation: Option<bool>,
}

/// What the Transfer-Encoding fields list, taken together.
#[derive(Default, PartialEq, Eq)]
enum Codings {
    #[default]
    None,
    Chunked,
    Unknown,
    Wrong,
}

impl<'a> Facts<'a> {
    fn gather(fields: &[httparse::Header<'a>]) -> Result<Self, Reject> {
        let mut facts = Self::default();
        for field in fields {
            let is = |name: &str| field.name.eq_ignore_ascii_case(name);
            match field.name.len() {
                2 if is("te") => {
                    facts.takes_trailers |=
                        list(field.value).any(|member| member.eq_ignore_ascii_case(b"trailers"));
                }
                4 if is("host") => {
                    facts.second_host |= facts.host.replace(field.value).is_some();
                }
                6 if is("expect") => {
                    facts.expectation = Some(field.value.eq_ignore_ascii_case(b"100-continue"));
                }
                7 if is("upgrade") => facts.upgrade_named = true,
                10 if is("connection") => {
                    for option in list(field.value) {
                        facts.closes |= option.eq_ignore_ascii_case(b"close");
                        facts.keeps_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                        facts.upgrades |= option.eq_ignore_ascii_case(b"upgrade");
                    }
                }
                14 if is("content-length") => facts.add_length(field.value)?,
                17 if is("transfer-encoding") => {
                    if list(field.value).next().is_none() {
                        facts.codings = Codings::Wrong;
                    }
                    list(field.value).for_each(|coding| facts.codings.add(coding));
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    /// One length may be repeated (RFC 9110 §8.6); two lengths are two ends of one body.
    fn add_length(&mut self, value: &[u8]) -> Result<(), Reject> {
        for number in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
            let length = decimal(number)
                .ok_or(Reject::bad_request("The Content-Length is not a number that can be a length."))?;
            if self.length.replace(length).is_some_and(|earlier| earlier != length) {
                return Err(Reject::bad_request("There are two different Content-Lengths."));
            }
        }
        Ok(())
    }

    fn framing(&self, version: Version) -> Result<Framing, Reject> {
        match self.codings {
            Codings::None => Ok(Framing::Length(self.length.unwrap_or(0))),
            _ if self.length.is_some() => {
                Err(Reject::bad_request("A request can't have both Content-Length and Transfer-Encoding."))
            }
            _ if version == Version::HTTP_10 => {
                Err(Reject::bad_request("HTTP/1.0 has no Transfer-Encoding."))
            }
            Codings::Chunked => Ok(Framing::Chunked),
            Codings::Unknown => {
                Err(Reject::not_implemented("The only transfer coding understood here is chunked."))
            }
            Codings::Wrong => {
                Err(Reject::bad_request("The Transfer-Encoding doesn't say where the body ends."))
            }
        }
    }

    fn host(&self, version: Version) -> Result<Option<&'a [u8]>, Reject> {
        match self.host {
            _ if self.second_host => Err(Reject::bad_request("There is more than one Host.")),
            None if version == Version::HTTP_11 => Err(Reject::bad_request("The Host is missing.")),
            Some(host) if !is_authority(host) => Err(Reject::bad_request("The Host is malformed.")),
            host => Ok(host),
        }
    }

    fn keep_alive(&self, version: Version) -> bool {
        !self.closes && (version == Version::HTTP_11 || self.keeps_alive)
    }

    fn may_upgrade(&self, version: Version) -> bool {
        version == Version::HTTP_11 && self.upgrades && self.upgrade_named
    }

    fn expects_continue(&self, version: Version) -> Result<bool, Reject> {
        match self.expectation {
            // RFC 9110 §10.1.1: an expectation in HTTP/1.0 is ignored.
            Some(_) if version == Version::HTTP_10 => Ok(false),
            Some(false) => Err(Reject::EXPECTATION),
            expectation => Ok(expectation.is_some()),
        }
    }
}

impl Codings {
    fn add(&mut self, coding: &[u8]) {
        let chunked = coding.eq_ignore_ascii_case(b"chunked");
        *self = match self {
            Self::None | Self::Unknown if !chunked => Self::Unknown,
            Self::None => Self::Chunked,
            // Chunked comes last, once; then the body's end is known, even if what it contains isn't.
            Self::Unknown => Self::Unknown,
            Self::Chunked | Self::Wrong => Self::Wrong,
        };
    }
}

fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty())
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// `uri-host [ ":" port ]` (RFC 9110 §7.2), which may be empty.
fn is_authority(host: &[u8]) -> bool {
    let (name, port) = split_port(host);
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(byte);
    let well_formed = match name {
        [b'[', address @ .., b']'] => {
            !address.is_empty() && address.iter().all(|byte| is_name(byte) || *byte == b':')
        }
        name => name.iter().all(is_name),
    };
    well_formed && port.is_none_or(|port| port.iter().all(u8::is_ascii_digit))
}

/// A host and its port; the colons of an IPv6 literal stay inside its brackets.
pub fn split_port(host: &[u8]) -> (&[u8], Option<&[u8]>) {
    let bracket = host.iter().rposition(|&byte| byte == b']').map_or(0, |at| at + 1);
    match host[bracket..].iter().position(|&byte| byte == b':') {
        Some(colon) => (&host[..bracket + colon], Some(&host[bracket + colon + 1..])),
        None => (host, None),
    }
}

fn malformed_target<E>(_: E) -> Reject {
    Reject::bad_request("The request target is malformed.")
}

fn path_and_query(bytes: Bytes) -> Result<Uri, Reject> {
    PathAndQuery::from_maybe_shared(bytes).map(Uri::from).map_err(malformed_target)
}

fn origin_form(original: &Uri) -> Uri {
    match (original.authority(), original.path_and_query()) {
        (None, _) => original.clone(),
        (Some(_), Some(path)) => Uri::from(path.clone()),
        (Some(_), None) => Uri::default(),
    }
}

fn headers(bytes: &Bytes, fields: &[httparse::Header<'_>]) -> Result<HeaderMap, Reject> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes())
            .map_err(|_| Reject::bad_request("A header field's name is malformed."))?;
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(field.value))
            .map_err(|_| Reject::bad_request("A header field's value is malformed."))?;
        // A length that was sent twice is one length.
        if name == CONTENT_LENGTH && headers.contains_key(CONTENT_LENGTH) {
            continue;
        }
        headers.append(name, value);
    }
    Ok(headers)
}

/// The request target as the client sent it, before the function's prefix was taken off.
#[derive(Clone, Debug)]
pub struct OriginalUri(pub Uri);

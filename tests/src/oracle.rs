//! What a first flight means by parsers that are not ours: httparse and tls-parser.
use tls_parser::{
    SNIType, TlsExtension, TlsMessage, TlsMessageHandshake, parse_tls_extension_sni_content,
    parse_tls_message_handshake, parse_tls_raw_record,
};

/// The part of a first flight that routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// The function that the target or the host names.
    Function(String),
    /// Well-formed, and it names nothing that could be a function.
    Nothing,
    Malformed,
    /// More bytes could change it.
    Incomplete,
}

/// Which function a request's head names.
pub fn http(bytes: &[u8]) -> Route {
    let mut fields = [httparse::EMPTY_HEADER; 256];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Err(_) => Route::Malformed,
        Ok(httparse::Status::Partial) => Route::Incomplete,
        Ok(httparse::Status::Complete(_)) => target(request.path.unwrap_or_default()),
    }
}

/// The rule of the product's documents, in the simplest words: the raw segment behind `/function/`.
fn target(target: &str) -> Route {
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)));
    let path = match scheme {
        Some(scheme) => {
            target[scheme.len()..].find(['/', '?', '#']).map_or("", |end| &target[scheme.len() + end..])
        }
        None => target,
    };
    let Some(rest) = path.strip_prefix("/function/") else { return Route::Nothing };
    let name = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let is_name_byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&name.len()) && name.bytes().all(is_name_byte) {
        Route::Function(name.to_owned())
    } else {
        Route::Nothing
    }
}

/// Which host a flight of records names: its function by one of our domains, or nothing.
pub fn tls(bytes: &[u8], domains: &[&str]) -> Route {
    let message = match handshake_message(bytes) {
        Ok(message) => message,
        Err(route) => return route,
    };
    let Ok((rest, TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello)))) =
        parse_tls_message_handshake(&message)
    else {
        return Route::Malformed;
    };
    let Some(extensions) = hello.ext else { return Route::Nothing };
    if !rest.is_empty() {
        return Route::Malformed;
    }
    let Some(names) = server_names(extensions) else { return Route::Malformed };
    match names[..] {
        [] => Route::Nothing,
        [ref names] => match names[..] {
            [(SNIType::HostName, name)] => host(name, domains),
            [] => Route::Nothing,
            _ => Route::Malformed,
        },
        _ => Route::Malformed,
    }
}

type Names<'a> = Vec<(SNIType, &'a [u8])>;

/// The content of each server_name extension. Others may be anything: to judge them is the server's business.
fn server_names(mut extensions: &[u8]) -> Option<Vec<Names<'_>>> {
    let mut found = Vec::new();
    while !extensions.is_empty() {
        let (&[kind_high, kind_low, high, low], rest) = extensions.split_first_chunk()?;
        let (content, rest) = rest.split_at_checked(usize::from(high) << 8 | usize::from(low))?;
        if (kind_high, kind_low) == (0, 0) {
            let Ok(([], TlsExtension::SNI(names))) = parse_tls_extension_sni_content(content) else {
                return None;
            };
            // tls-parser drops what is left of a list when the next name is cut.
            let listed: usize = names.iter().map(|(_, name)| 3 + name.len()).sum();
            if !content.is_empty() && content.len() != 2 + listed {
                return None;
            }
            found.push(names);
        }
        extensions = rest;
    }
    Some(found)
}

fn host(name: &[u8], domains: &[&str]) -> Route {
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    let function = domains.iter().find_map(|domain| name.strip_suffix(domain)?.strip_suffix('.'));
    function.map_or(Route::Nothing, |function| Route::Function(function.to_owned()))
}

/// The first handshake message, over as many records as it takes.
fn handshake_message(bytes: &[u8]) -> Result<Vec<u8>, Route> {
    let mut message = Vec::new();
    let mut rest = bytes;
    loop {
        if let Some(&[_, l2, l1, l0]) = message.first_chunk::<4>() {
            let length = 4 + (usize::from(l2) << 16 | usize::from(l1) << 8 | usize::from(l0));
            if message.len() >= length {
                message.truncate(length);
                return Ok(message);
            }
        }
        match parse_tls_raw_record(rest) {
            Ok((_, record)) if record.hdr.record_type.0 != 22 || record.hdr.version.0 >> 8 != 3 => {
                return Err(Route::Malformed);
            }
            Ok((_, record)) if record.data.is_empty() => return Err(Route::Malformed),
            Ok((tail, record)) => {
                message.extend_from_slice(record.data);
                rest = tail;
            }
            Err(error) if error.is_incomplete() => return Err(Route::Incomplete),
            Err(_) => return Err(Route::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::{CHROMIUM, EXTENSION_SERVER_NAME, Hello, records, server_name, server_names};

    #[test]
    fn targets() {
        let route = |target: &str| http(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes());
        assert_eq!(route("/function/echo?x"), Route::Function("echo".into()));
        assert_eq!(route("HTTP://host/function/echo/x"), Route::Function("echo".into()));
        assert_eq!(route("/function/Echo"), Route::Nothing);
        assert_eq!(route("/function//echo"), Route::Nothing);
        assert_eq!(http(b"GET /function/echo HTTP/1.1\r\n"), Route::Incomplete);
        assert_eq!(http(b"GET\x00"), Route::Malformed);
    }

    #[test]
    fn hellos() {
        let domains = ["faas.local"];
        let echo = Route::Function("echo".into());
        assert_eq!(tls(CHROMIUM, &domains), Route::Function("hello".into()));
        let hello = Hello::named(b"ECHO.faas.local");
        assert_eq!(tls(&hello.bytes(), &domains), echo);
        assert_eq!(tls(&records(&hello.message(), 1), &domains), echo);
        assert_eq!(tls(&hello.bytes()[..60], &domains), Route::Incomplete);
        assert_eq!(tls(&Hello::new().bytes(), &domains), Route::Nothing);
        assert_eq!(tls(&Hello::named(b"echo.faas.local.").bytes(), &domains), Route::Nothing);
        let twice = hello.clone().with(EXTENSION_SERVER_NAME, server_name(b"x"));
        assert_eq!(tls(&twice.bytes(), &domains), Route::Malformed);
        let two = Hello::new().with(EXTENSION_SERVER_NAME, server_names(&[(0, b"a"), (0, b"b")]));
        assert_eq!(tls(&two.bytes(), &domains), Route::Malformed);
    }
}

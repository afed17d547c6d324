//! The bytes that each refused connection gets.
use common::{Protocol, Refusal};

/// A whole answer, made without knowing what the client sent: the gateway's reason is all there is.
pub fn to(protocol: Protocol, refusal: Refusal) -> Vec<u8> {
    match (protocol, refusal) {
        (Protocol::Http, refusal) => response(&http(refusal)),
        (Protocol::Https, Refusal::OtherProtocol) => response(&Response {
            status: "400 Bad Request",
            fields: "",
            sentence: "This is the HTTPS port: use https:// instead of http://.",
        }),
        (Protocol::Https, refusal) => alert(description(refusal)),
    }
}

struct Response {
    status: &'static str,
    fields: &'static str,
    sentence: &'static str,
}

fn http(refusal: Refusal) -> Response {
    let (status, fields, sentence) = match refusal {
        Refusal::NoFunction => ("404 Not Found", "", "No function answers here."),
        Refusal::Malformed => ("400 Bad Request", "", "The request is malformed."),
        Refusal::IllegalParameter => ("400 Bad Request", "", "The request has an illegal value."),
        Refusal::OtherProtocol => {
            ("400 Bad Request", "", "This is the HTTP port: use http:// instead of https://.")
        }
        Refusal::UnexpectedMessage => ("400 Bad Request", "", "This is not HTTP."),
        Refusal::UnsupportedVersion => {
            ("505 HTTP Version Not Supported", "", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
        }
        Refusal::TooLong => ("414 URI Too Long", "", "The request line is too long."),
        Refusal::Timeout => ("408 Request Timeout", "", "The request did not arrive in time."),
        Refusal::Unavailable => (
            "503 Service Unavailable",
            "Retry-After: 1\r\n",
            "The function can't take the request now: try again.",
        ),
        Refusal::Incomplete => {
            ("400 Bad Request", "", "The connection ended before the request was complete.")
        }
    };
    Response { status, fields, sentence }
}

/// The client's method isn't known, so an answer to HEAD has a body, too; the connection ends behind it either way.
fn response(Response { status, fields, sentence }: &Response) -> Vec<u8> {
    let length = sentence.len() + 1;
    let date = httpdate::fmt_http_date(std::time::SystemTime::now());
    format!(
        "HTTP/1.1 {status}\r\n{fields}Content-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\
         Date: {date}\r\nConnection: close\r\n\r\n{sentence}\n"
    )
    .into_bytes()
}

/// The number of an alert in RFC 8446 §6.
fn description(refusal: Refusal) -> u8 {
    match refusal {
        Refusal::NoFunction => 112,
        Refusal::Malformed | Refusal::TooLong | Refusal::Incomplete => 50,
        Refusal::IllegalParameter => 47,
        Refusal::OtherProtocol | Refusal::UnexpectedMessage => 10,
        Refusal::UnsupportedVersion => 70,
        Refusal::Timeout => 90,
        Refusal::Unavailable => 80,
    }
}

/// A fatal alert in the clear, in a record of the version that every client takes before a version is agreed.
fn alert(description: u8) -> Vec<u8> {
    vec![0x15, 3, 1, 0, 2, 2, description]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_over_http_is_whole_and_the_last_one() {
        for refusal in Refusal::ALL {
            let answer = String::from_utf8(to(Protocol::Http, refusal)).unwrap();
            let mut fields = [httparse::EMPTY_HEADER; 8];
            let mut head = httparse::Response::new(&mut fields);
            let length = head.parse(answer.as_bytes()).unwrap().unwrap();
            let status = head.code.unwrap();
            let field = |name| {
                let field = head.headers.iter().find(|field| field.name == name);
                field.map(|field| std::str::from_utf8(field.value).unwrap())
            };
            let body = &answer[length..];
            assert_eq!(field("Content-Length"), Some(body.len().to_string().as_str()), "{refusal:?}");
            assert_eq!(field("Connection"), Some("close"), "{refusal:?}");
            assert_eq!(field("Retry-After"), (status == 503).then_some("1"), "{refusal:?}");
            assert!(body.ends_with(".\n") && status >= 400, "{refusal:?}: {answer}");
        }
    }

    #[test]
    fn the_alerts_are_the_rfcs() {
        let alert = |refusal| to(Protocol::Https, refusal);
        assert_eq!(alert(Refusal::NoFunction), [21, 3, 1, 0, 2, 2, 112]);
        assert_eq!(alert(Refusal::TooLong)[6], 50);
        assert_eq!(alert(Refusal::IllegalParameter)[6], 47);
        assert_eq!(alert(Refusal::UnexpectedMessage)[6], 10);
        assert_eq!(alert(Refusal::Timeout)[6], 90);
        assert_eq!(alert(Refusal::Unavailable)[6], 80);
        assert!(alert(Refusal::OtherProtocol).starts_with(b"HTTP/1.1 400 "));
    }
}

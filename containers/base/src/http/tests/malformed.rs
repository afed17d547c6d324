//! Requests that are wrong: each gets its status, nobody's handler hears of it, and the connection ends.
use proptest::{prelude::*, sample::Index, test_runner::TestCaseResult};

use super::*;
use crate::http::{
    head::{Fields, Head, HeadScan},
    limits::{FIELDS, HEAD_BYTES, REQUEST_LINE_BYTES},
};

/// Requests and the status of their refusal.
fn malformed() -> Vec<(u16, Vec<u8>)> {
    let head = |fields: &str| format!("POST /function/echo HTTP/1.1\r\n{fields}\r\n");
    let hosted = |fields: &str| head(&format!("Host: a\r\n{fields}"));
    let chunked = |body: &str| hosted("Transfer-Encoding: chunked\r\n") + body;
    let texts = vec![
        // Two ends of one body.
        (400, hosted("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n"),
        (400, hosted("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n") + "0\r\n\r\n"),
        (400, hosted("Content-Length: 3\r\nContent-Length: 4\r\n") + "abcd"),
        (400, hosted("Content-Length: 3, 4\r\n") + "abcd"),
        (400, hosted("Content-Length: +3\r\n") + "abc"),
        (400, hosted("Content-Length: -1\r\n")),
        (400, hosted("Content-Length: 3x\r\n") + "abc"),
        (400, hosted("Content-Length: 0x3\r\n") + "abc"),
        (400, hosted("Content-Length:\r\n")),
        (400, hosted("Content-Length: 18446744073709551616\r\n")),
        // Transfer codings.
        (501, hosted("Transfer-Encoding: gzip\r\n")),
        (501, hosted("Transfer-Encoding: gzip, chunked\r\n") + "0\r\n\r\n"),
        (501, hosted("Transfer-Encoding: identity\r\n")),
        (501, hosted("Transfer-Encoding: xchunked\r\n") + "0\r\n\r\n"),
        (400, hosted("Transfer-Encoding: chunked, gzip\r\n") + "0\r\n\r\n"),
        (400, hosted("Transfer-Encoding: chunked, chunked\r\n") + "0\r\n\r\n"),
        (400, hosted("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n"),
        (400, hosted("Transfer-Encoding:\r\n")),
        (400, hosted("Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n") + "0\r\n\r\n"),
        (400, "POST /function/echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into()),
        // Line ends, blanks and control characters.
        (400, head("Host: a\r\nX: a\rb\r\n")),
        (400, head("Host: a\rX: b\r\n")),
        (400, head("Host: a\nX: b\r\n")),
        (400, "GET /function/echo HTTP/1.1\nHost: a\n\n".into()),
        (400, head("Host: a\r\nX : b\r\n")),
        (400, head("Host: a\r\nContent-Length : 3\r\n") + "abc"),
        (400, head("Host: a\r\nX: b\r\n folded\r\n")),
        (400, head("Host: a\r\nX: b\r\n\tfolded\r\n")),
        (400, head(" Host: a\r\n")),
        (400, head("Host: a\r\nX: a\0b\r\n")),
        (400, head("Host: a\r\nX: a\x7fb\r\n")),
        (400, head("Host: a\r\nX\0: b\r\n")),
        (400, head("Host: a\r\nX\r\n")),
        (400, head("Host: a\r\n: b\r\n")),
        (400, head("Host: a\r\nX(y): b\r\n")),
        // Hosts.
        (400, head("")),
        (400, head("Host: a\r\nHost: a\r\n")),
        (400, head("Host: a\r\nHost: b\r\n")),
        (400, head("Host: a b\r\n")),
        (400, head("Host: a/b\r\n")),
        (400, head("Host: user@a\r\n")),
        (400, head("Host: a:b\r\n")),
        (400, head("Host: [::1\r\n")),
        (400, head("Host: a, b\r\nHost:\r\n")),
        (400, "GET http://user@a/function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET http://echo:80@a/function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (414, format!("GET http://{}/function/echo HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(261))),
        (400, "GET http://a:b/function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        // Chunks.
        (400, chunked("x\r\n")),
        (400, chunked("-1\r\n")),
        (400, chunked("0x1\r\na\r\n0\r\n\r\n")),
        (400, chunked("1 \r\na\r\n0\r\n\r\n")),
        (400, chunked("1\na\n0\n\n")),
        (400, chunked("1;a\nb\r\na\r\n0\r\n\r\n")),
        (400, chunked("\r\n")),
        (400, chunked("fffffffffffffffff\r\n")),
        // Request lines.
        (400, "GET  /function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET /function/echo  HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET /function/echo HTTP/1.1 \r\nHost: a\r\n\r\n".into()),
        (400, " GET /function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET /function/echo\r\n\r\n".into()),
        (400, "GET\r\n\r\n".into()),
        (400, "G(T /function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, format!("{} /function/echo HTTP/1.1\r\nHost: a\r\n\r\n", "M".repeat(33))),
        (400, "GET function/echo HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET /function/echo/<x HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET /function/\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n".into()),
        (400, "GET /function/echo HTTX/1.1\r\nHost: a\r\n\r\n".into()),
        (505, "GET /function/echo HTTP/2.0\r\nHost: a\r\n\r\n".into()),
        (505, "GET /function/echo HTTP/1.2\r\nHost: a\r\n\r\n".into()),
        (505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
        (417, hosted("Expect: 200-ok\r\nContent-Length: 3\r\n") + "abc"),
        // Sizes.
        (414, format!("GET /function/echo/{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(REQUEST_LINE_BYTES))),
        (431, head(&format!("Host: a\r\nX: {}\r\n", "x".repeat(HEAD_BYTES)))),
        (431, head(&format!("Host: a\r\n{}", "X: y\r\n".repeat(FIELDS)))),
        (400, "\r\n".repeat(17) + &get("")),
    ];
    let mut requests: Vec<_> = texts.into_iter().map(|(status, text)| (status, text.into_bytes())).collect();
    requests.push((400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()));
    requests.push((400, vec![0xff; 100]));
    requests
}

/// Sends `before` sound requests and then the wrong one, in pieces.
async fn is_refused(status: u16, request: &[u8], before: usize, cuts: &[Index]) -> TestCaseResult {
    let log = Log::default();
    let mut site = Site::new(recorder(&log));
    let sound = format!("PUT /function/echo/{} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok", "x");
    let bytes = [sound.repeat(before).as_bytes(), request].concat();
    let mut offsets: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
    offsets.extend([0, bytes.len()]);
    offsets.sort_unstable();
    for pair in offsets.windows(2) {
        // The server may have answered and ended before it was sent all.
        if site.client.write_all(&bytes[pair[0]..pair[1]]).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    site.half_close();
    let received = site.rest().await;
    let answers = Answer::parse_all(&received, &vec!["PUT"; before + 1]);
    for answer in &answers[..before] {
        prop_assert_eq!((answer.status, answer.text()), (200, "ok"));
    }
    let last = &answers[before];
    prop_assert_eq!(last.status, status, "{}: {}", request.escape_ascii(), last.text());
    prop_assert_eq!(last.field("connection"), Some("close"));
    prop_assert!(last.text().ends_with(".\n"), "{:?}", last);
    prop_assert_eq!(log.borrow().len(), before, "{} reached a handler", request.escape_ascii());
    Ok(())
}

#[test]
fn each_gets_its_status_and_reaches_no_handler() {
    for (status, request) in malformed() {
        run(is_refused(status, &request, 0, &[])).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn in_pieces_and_behind_sound_requests_as_well(
        (status, request) in prop::sample::select(malformed()),
        before in 0usize..4,
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        run(is_refused(status, &request, before, &cuts))?;
    }
}

/// What a head comes to when it arrives in these steps: its status, or none when it is sound.
fn status_of(steps: &[&[u8]]) -> Option<u16> {
    let mut scan = HeadScan::default();
    for input in steps {
        match scan.next(input) {
            Ok(Some(length)) => {
                return Head::parse(&input[..length], &mut Fields::new())
                    .err()
                    .map(|reject| reject.status.as_u16());
            }
            Ok(None) => {}
            Err(reject) => return Some(reject.status.as_u16()),
        }
    }
    None
}

#[test]
fn no_cut_changes_the_answer() {
    for (_, request) in malformed().into_iter().filter(|(_, request)| request.len() < 1000) {
        let whole = status_of(&[&request]);
        for cut in 1..request.len() {
            assert_eq!(status_of(&[&request[..cut], &request]), whole, "{}", request[..cut].escape_ascii());
        }
        let bytewise: Vec<_> = (1..=request.len()).map(|end| &request[..end]).collect();
        assert_eq!(status_of(&bytewise), whole, "{}", request.escape_ascii());
    }
}

#[test]
fn a_wrong_chunk_behind_a_right_one_ends_the_request() {
    run(async {
        let site = Site::new(tower::service_fn(|request: Request<Body>| async {
            request.into_body().collect().await.map(|body| Response::new(Full::new(body.to_bytes())))
        }));
        let request =
            "POST /function/echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nx\r\n";
        let received = site.all(request).await;
        let answers = Answer::parse_all(received.as_bytes(), &["POST"]);
        assert_eq!(answers[0].status, 400);
    });
}

#[test]
fn an_incomplete_request_is_told_so() {
    run(async {
        for request in ["GET /function/echo HTTP/1.1\r\nHost", "G"] {
            let received = Site::new(tower::service_fn(greet)).all(request).await;
            assert_eq!(Answer::parse_all(received.as_bytes(), &["GET"])[0].status, 400, "{request}");
        }
        let log = Log::default();
        let request = "POST /function/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf";
        let received = Site::new(recorder(&log)).all(request).await;
        assert_eq!(Answer::parse_all(received.as_bytes(), &["POST"])[0].status, 400);
        assert!(log.borrow().is_empty());
    });
}

#[test]
fn what_is_merely_unusual_is_served() {
    for (request, uri) in [
        ("\r\n\r\nGET /function/echo HTTP/1.1\r\nHost: a\r\n\r\n", "/"),
        ("GET /function/echo HTTP/1.1\r\nhOST:a\r\n\r\n", "/"),
        ("GET /function/echo HTTP/1.1\r\nHost:\r\n\r\n", "/"),
        ("GET /function/echo HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", "/"),
        ("GET /function/echo?a=%20&b={x} HTTP/1.1\r\nHost: a\r\nX:  \t y \t\r\n\r\n", "/?a=%20&b={x}"),
        ("GET /function/echo HTTP/1.1\r\nHost: a\r\nX: \u{e9}\r\nEmpty:\r\n\r\n", "/"),
        ("X-~!#$%&'*+.^_`| /function/echo/../x HTTP/1.1\r\nHost: a\r\n\r\n", "/../x"),
        (
            "POST /function/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 2\r\nContent-Length: 02\r\n\r\nok",
            "/",
        ),
        (
            "POST /function/echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: , CHUNKED ,\r\n\r\n2;a=\"b\"\r\nok\r\n0\r\n\r\n",
            "/",
        ),
        ("GET /function/echo HTTP/1.0\r\nExpect: what\r\n\r\n", "/"),
    ] {
        let log = Log::default();
        run(async {
            let received = Site::new(recorder(&log)).all(request).await;
            assert!(received.starts_with("HTTP/1.1 200 OK\r\n"), "{request}: {received}");
        });
        assert_eq!(log.borrow()[0].uri, uri, "{request}");
    }
}

//! Requests on one connection, cut anywhere: all are answered, in order, with exactly their bodies.
use proptest::{prelude::*, sample::Index, test_runner::TestCaseResult};

use super::*;

#[derive(Clone, Debug)]
struct Sent {
    method: &'static str,
    /// How its handler answers.
    way: &'static str,
    body: Vec<u8>,
    /// The sizes of its chunks; none for a Content-Length.
    chunks: Option<Vec<Index>>,
}

impl Sent {
    fn bytes(&self) -> Vec<u8> {
        let Self { method, way, body, chunks } = self;
        let head = format!("{method} /function/echo/{way} HTTP/1.1\r\nHost: a\r\n");
        let Some(chunks) = chunks else {
            let length = format!("Content-Length: {}\r\n\r\n", body.len());
            let length = if body.is_empty() { "\r\n".to_owned() } else { length };
            return [head.as_bytes(), length.as_bytes(), body].concat();
        };
        let mut bytes = (head + "Transfer-Encoding: chunked\r\n\r\n").into_bytes();
        let mut cuts: Vec<_> = chunks.iter().map(|cut| cut.index(body.len() + 1)).collect();
        cuts.extend([0, body.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        for pair in cuts.windows(2) {
            bytes.extend_from_slice(format!("{:x}\r\n", pair[1] - pair[0]).as_bytes());
            bytes.extend_from_slice(&body[pair[0]..pair[1]]);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        bytes
    }

    fn expected(&self) -> &[u8] {
        match (self.method, self.way) {
            ("HEAD", _) | (_, "empty") => b"",
            (_, "ignore") => b"ignored",
            _ => &self.body,
        }
    }
}

/// Answers in the way that the path asks for.
async fn handle(request: Request<Body>) -> Result<Response<Body>, crate::http::BodyError> {
    Ok(match request.uri().path() {
        "/stream" => Response::new(request.into_body()),
        "/collect" => Response::new(Body::from(request.into_body().collect().await?.to_bytes())),
        "/late" => {
            tokio::task::yield_now().await;
            let body = request.into_body().collect().await?.to_bytes();
            tokio::task::yield_now().await;
            Response::new(Body::from(body))
        }
        "/ignore" => Response::new(Body::from("ignored")),
        _ => Response::builder().status(204).body(Body::empty()).unwrap(),
    })
}

fn sent() -> impl Strategy<Value = Sent> {
    (
        prop::sample::select(vec!["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"]),
        prop::sample::select(vec!["stream", "collect", "late", "ignore", "empty"]),
        prop_oneof![
            Just(Vec::new()),
            prop::collection::vec(any::<u8>(), 1..200),
            (1usize..100_000, any::<u8>()).prop_map(|(size, byte)| vec![byte; size]),
        ],
        prop::option::of(prop::collection::vec(any::<Index>(), 0..5)),
    )
        .prop_map(|(method, way, body, chunks)| Sent { method, way, body, chunks })
}

async fn all_are_answered(requests: &[Sent], cuts: &[Index], wait: bool) -> TestCaseResult {
    let site = Site::new(tower::service_fn(handle));
    let bytes: Vec<u8> = requests.iter().flat_map(Sent::bytes).collect();
    let mut offsets: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
    offsets.extend([0, bytes.len()]);
    offsets.sort_unstable();
    let Site { mut client, served, .. } = site;
    let (mut reader, mut writer) = client.split();
    let write = async {
        for pair in offsets.windows(2) {
            writer.write_all(&bytes[pair[0]..pair[1]]).await.unwrap();
            if wait {
                tokio::task::yield_now().await;
            }
        }
        writer.shutdown().await.unwrap();
    };
    let read = async {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        received
    };
    let ((), received) = tokio::join!(write, read);
    served.await.unwrap();
    let methods: Vec<_> = requests.iter().map(|request| request.method).collect();
    let answers = Answer::parse_all(&received, &methods);
    for (request, answer) in requests.iter().zip(&answers) {
        let status = if request.way == "empty" { 204 } else { 200 };
        prop_assert_eq!(answer.status, status);
        prop_assert!(answer.body == request.expected(), "{:?} got {} bytes", request, answer.body.len());
        prop_assert_eq!(answer.field("connection"), None);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn all_are_answered_in_order_with_exact_bodies(
        requests in prop::collection::vec(sent(), 1..8),
        cuts in prop::collection::vec(any::<Index>(), 0..12),
        wait in any::<bool>(),
    ) {
        run(all_are_answered(&requests, &cuts, wait))?;
    }
}

#[test]
fn a_request_in_single_bytes_is_a_request() {
    let log = Log::default();
    run(async {
        let mut site = Site::new(recorder(&log));
        let request = "POST /function/echo/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        for byte in request.as_bytes() {
            site.send([*byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(site.answer().await.text(), "ok");
    });
    assert_eq!(log.borrow().len(), 1);
}

#[test]
fn a_hundred_at_once_are_answered_in_order() {
    run(async {
        let site = Site::new(tower::service_fn(|request: Request<Body>| async move {
            Ok::<_, Infallible>(Response::new(Body::from(request.uri().path().to_owned())))
        }));
        let requests: String = (0..100).map(|number| get(&format!("/{number}"))).collect();
        let received = site.all(requests).await;
        let answers = Answer::parse_all(received.as_bytes(), &["GET"; 100]);
        for (number, answer) in answers.iter().enumerate() {
            assert_eq!(answer.text(), format!("/{number}"));
        }
    });
}

#[test]
fn a_slow_answer_doesnt_hold_an_earlier_one_back() {
    run(async {
        let mut site = Site::new(tower::service_fn(|request: Request<Body>| async move {
            if request.uri().path() == "/never" {
                std::future::pending::<()>().await;
            }
            Ok::<_, Infallible>(Response::new(Body::from("now")))
        }));
        site.send(get("/") + &get("/never")).await;
        assert_eq!(site.answer().await.text(), "now");
    });
}

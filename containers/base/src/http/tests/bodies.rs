//! Bodies in both directions: framing, back-pressure, expectations, and what nobody reads.
use std::{
    cell::Cell,
    pin::Pin,
    task::{Context, Poll},
};

use http_body::Frame;
use http_body_util::{Empty, StreamBody};

use super::*;
use crate::http::BodyError;

fn post(fields: &str, body: &str) -> String {
    format!("POST /function/echo HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}")
}

/// A body without a known length.
struct Pieces(Vec<Frame<Bytes>>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready((!self.0.is_empty()).then(|| Ok(self.0.remove(0))))
    }
}

async fn pieces(_: Request<Body>) -> Result<Response<Pieces>, Infallible> {
    let sum = [("x-sum", "1"), ("content-length", "5")];
    let trailers = sum.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
    Ok(Response::new(Pieces(vec![
        Frame::data(Bytes::from_static(b"one")),
        Frame::data(Bytes::new()),
        Frame::data(Bytes::from_static(b"two")),
        Frame::trailers(trailers.into_iter().collect()),
    ])))
}

#[test]
fn an_answer_of_unknown_length_is_chunked_or_ends_the_connection() {
    run(async {
        let mut site = Site::new(tower::service_fn(pieces));
        site.send(get("")).await;
        let answer = site.answer().await;
        assert_eq!((answer.text(), answer.trailers.as_str()), ("onetwo", ""));
        site.send("GET /function/echo HTTP/1.1\r\nHost: a\r\nTE: gzip, trailers\r\n\r\n").await;
        let answer = site.answer().await;
        assert_eq!((answer.text(), answer.trailers.as_str()), ("onetwo", "x-sum: 1"));
        site.send("HEAD /function/echo HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(site.answer_to("HEAD").await.status, 200);
        site.send("GET /function/echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
        let received = site.rest().await;
        let answer = &Answer::parse_all(&received, &["GET"])[0];
        assert_eq!((answer.text(), answer.field("connection")), ("onetwo", Some("close")));
    });
}

#[test]
fn trailers_reach_the_handler() {
    run(async {
        let site = Site::new(tower::service_fn(|request: Request<Body>| async {
            let body = request.into_body().collect().await?;
            let sum = body.trailers().and_then(|trailers| trailers.get("sum")).cloned().unwrap();
            Ok::<_, BodyError>(Response::new(Body::from(sum.to_str().unwrap().to_owned())))
        }));
        let body = "3\r\nabc\r\n0\r\nSum: 294\r\nContent-Length: 9\r\n\r\n";
        let received = site.all(post("Transfer-Encoding: chunked\r\n", body)).await;
        assert_eq!(Answer::parse_all(received.as_bytes(), &["POST"])[0].text(), "294");
    });
}

#[test]
fn a_body_that_lies_about_its_length_is_cut() {
    for length in ["5", "7"] {
        run(async {
            let mut site = Site::new(tower::service_fn(move |_: Request<Body>| async move {
                let body = Pieces(vec![Frame::data(Bytes::from_static(b"six---"))]);
                Response::builder().header("content-length", length).body(body)
            }));
            site.send(get("")).await;
            let received = site.rest().await;
            assert!(Answer::parse(&received, "GET", false).is_none(), "{}", received.escape_ascii());
        });
    }
}

#[test]
fn a_body_that_fails_is_cut_and_its_client_can_tell() {
    async fn fails(_: Request<Body>) -> Result<Response<StreamBody<Failing>>, Infallible> {
        Ok(Response::new(StreamBody::new(Failing(false))))
    }
    struct Failing(bool);
    impl futures_core::Stream for Failing {
        type Item = Result<Frame<Bytes>, std::io::Error>;
        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            let first = !std::mem::replace(&mut self.0, true);
            let data = Bytes::from_static(&[b'x'; 10_000]);
            Poll::Ready(Some(if first { Ok(Frame::data(data)) } else { Err(std::io::Error::other("x")) }))
        }
    }
    run(async {
        let mut site = Site::new(tower::service_fn(fails));
        site.send(get("")).await;
        let received = site.rest().await;
        assert!(received.starts_with(b"HTTP/1.1 200 OK\r\n"));
        assert!(Answer::parse(&received, "GET", false).is_none());
        // Without chunks, an orderly end would make it look complete.
        let mut site = Site::new(tower::service_fn(fails));
        site.send("GET /function/echo HTTP/1.0\r\n\r\n").await;
        let mut received = Vec::new();
        assert!(site.client.read_to_end(&mut received).await.is_err());
    });
}

#[test]
fn continue_is_sent_when_the_handler_reads_and_only_then() {
    let expects = |length| post(&format!("Content-Length: {length}\r\nExpect: 100-Continue\r\n"), "");
    run(async {
        for chunked in [false, true] {
            let mut site = Site::new(tower::service_fn(echo_whole));
            let (fields, body) = if chunked {
                ("Transfer-Encoding: chunked\r\n", "2\r\nok\r\n0\r\n\r\n")
            } else {
                ("Content-Length: 2\r\n", "ok")
            };
            site.send(post(&format!("{fields}Expect: 100-continue\r\n"), "")).await;
            assert_eq!(site.answer().await.status, 100);
            site.send(body).await;
            assert_eq!(site.answer().await.text(), "ok");
            // The body is there already.
            site.send(post(&format!("{fields}Expect: 100-continue\r\n"), body)).await;
            assert_eq!(site.answer().await.text(), "ok");
            site.send(get("")).await;
            assert_eq!(site.answer().await.status, 200);
        }
        // An answer that streams what it reads doesn't overtake.
        let mut site = Site::new(tower::service_fn(echo));
        site.send(expects(2)).await;
        let mut interim = [0; 25];
        site.client.read_exact(&mut interim).await.unwrap();
        assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        site.send("ok").await;
        assert_eq!(site.answer().await.text(), "ok");
        // A handler that doesn't read leaves open whether a body comes.
        let mut site = Site::new(tower::service_fn(greet));
        site.send(expects(2)).await;
        let answer = site.answer().await;
        assert_eq!((answer.text(), answer.field("connection")), ("hi", Some("close")));
        assert!(site.ended().await);
        // HTTP/1.0 doesn't know of it.
        let mut site = Site::new(tower::service_fn(echo));
        site.send("POST /function/echo HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n").await;
        site.send("ok").await;
        let received = site.rest().await;
        assert_eq!(Answer::parse_all(&received, &["POST"])[0].text(), "ok");
    });
}

#[test]
fn what_a_handler_leaves_is_read_up_to_a_bound() {
    run(async {
        let mut site = Site::new(tower::service_fn(greet));
        site.send(post("Content-Length: 200000\r\n", &"x".repeat(200_000))).await;
        assert_eq!(site.answer().await.text(), "hi");
        let chunk = format!("{:x}\r\n{}\r\n0\r\n\r\n", 100_000, "x".repeat(100_000));
        site.send(post("Transfer-Encoding: chunked\r\n", &chunk)).await;
        let answer = site.answer().await;
        assert_eq!((answer.text(), answer.field("connection")), ("hi", None));
        site.send(get("")).await;
        assert_eq!(site.answer().await.text(), "hi");
    });
}

#[test]
fn an_unread_upload_doesnt_swallow_the_answer() {
    run(async {
        for fields in ["Content-Length: 6000000\r\n", "Transfer-Encoding: chunked\r\n"] {
            let site = Site::new(tower::service_fn(greet));
            let Site { mut client, served, .. } = site;
            let (mut reader, mut writer) = client.split();
            let body = if fields.starts_with('C') {
                "x".repeat(6_000_000)
            } else {
                format!("{:x}\r\n{}\r\n", 60_000, "x".repeat(60_000)).repeat(100)
            };
            let request = post(fields, &body);
            let write = async {
                writer.write_all(request.as_bytes()).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let mut received = Vec::new();
            let ((), read) = tokio::join!(write, reader.read_to_end(&mut received));
            read.unwrap();
            served.await.unwrap();
            assert_eq!(Answer::parse_all(&received, &["POST"])[0].text(), "hi");
        }
    });
}

#[test]
fn a_body_over_the_limit_is_refused_before_or_while_it_is_read() {
    let limits = Limits { body_bytes: Some(10), ..Limits::default() };
    run(async {
        for (request, status) in [
            (post("Content-Length: 10\r\n", "0123456789"), 200),
            (post("Content-Length: 11\r\n", "0123456789x"), 413),
            (post("Transfer-Encoding: chunked\r\n", "5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n"), 200),
            (post("Transfer-Encoding: chunked\r\n", "5\r\n01234\r\n6\r\n56789x\r\n0\r\n\r\n"), 413),
            (post("Transfer-Encoding: chunked\r\n", "b\r\n0123456789x\r\n0\r\n\r\n"), 413),
        ] {
            let log = Log::default();
            let site = Site::with(Protocol::Http, limits.clone(), recorder(&log));
            let received = site.all(&request).await;
            assert_eq!(Answer::parse_all(received.as_bytes(), &["POST"])[0].status, status, "{request}");
            assert_eq!(log.borrow().len(), usize::from(status == 200));
        }
    });
}

#[test]
fn a_client_that_isnt_read_from_is_held_back() {
    run(async {
        let mut site = Site::new(tower::service_fn(|request: Request<Body>| async move {
            let _unread = request;
            std::future::pending::<Result<Response<Body>, Infallible>>().await
        }));
        site.send(post("Content-Length: 1000000000\r\n", "")).await;
        let block = vec![b'x'; 1 << 20];
        let mut sent_bytes = 0;
        // Waiting in vain for room is the outcome, so time has to pass.
        while let Ok(sent) = timeout(Duration::from_millis(300), site.client.write(&block)).await {
            sent_bytes += sent.unwrap();
            assert!(sent_bytes < 64 << 20, "nobody holds the client back");
        }
    });
}

#[test]
fn a_client_that_doesnt_read_holds_the_handler_back() {
    struct Endless(Rc<Cell<usize>>);
    impl http_body::Body for Endless {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.set(self.0.get() + 1);
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 1 << 16])))))
        }
    }
    impl Drop for Endless {
        fn drop(&mut self) {
            self.0.set(usize::MAX);
        }
    }
    run(async {
        let polled = Rc::new(Cell::new(0));
        let handed = Rc::clone(&polled);
        let mut site = Site::new(tower::service_fn(move |_: Request<Body>| {
            let body = Endless(Rc::clone(&handed));
            async { Ok::<_, Infallible>(Response::new(body)) }
        }));
        site.send(get("")).await;
        let mut before = usize::MAX;
        while polled.get() != before {
            before = polled.get();
            assert!(before < 1000 || before == usize::MAX, "nobody holds the handler back");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_ne!(before, 0);
        // A client that leaves ends the body.
        drop(site.client);
        site.served.await.unwrap();
        assert_eq!(polled.get(), usize::MAX);
    });
}

#[test]
fn answers_without_a_body_have_none() {
    run(async {
        let mut site = Site::new(tower::service_fn(|request: Request<Body>| async move {
            let status = request.uri().path()[1..].parse::<u16>().unwrap();
            Response::builder().status(status).body(Body::from("body"))
        }));
        for status in [204, 304, 200] {
            site.send(get(&format!("/{status}"))).await;
            let answer = site.answer().await;
            assert_eq!(answer.status, status);
            assert_eq!(answer.text(), if status == 200 { "body" } else { "" });
            assert_eq!(answer.field("content-length"), (status == 200).then_some("4"));
            assert!(answer.field("date").is_some());
        }
        site.send("HEAD /function/echo/200 HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let answer = site.answer_to("HEAD").await;
        assert_eq!(answer.field("content-length"), Some("4"));
        site.send(get("/205")).await;
        assert_eq!(site.answer().await.status, 205);
    });
    run(async {
        let site = Site::new(tower::service_fn(|_: Request<Body>| async {
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }));
        let received = site.all(get("")).await;
        assert_eq!(Answer::parse_all(received.as_bytes(), &["GET"])[0].field("content-length"), Some("0"));
    });
}

#[test]
fn a_body_can_be_read_elsewhere_and_after_the_answer() {
    run(async {
        let (report, mut reports) = tokio::sync::mpsc::unbounded_channel();
        let mut site = Site::new(tower::service_fn(move |request: Request<Body>| {
            let report = report.clone();
            async move {
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    let body = runtime.block_on(request.into_body().collect());
                    report.send(body.unwrap().to_bytes()).unwrap();
                });
                Ok::<_, Infallible>(Response::new(Body::from("taken")))
            }
        }));
        let body = "x".repeat(1_000_000);
        let (head, rest) = body.split_at(10);
        site.send(post("Content-Length: 1000000\r\n", head)).await;
        assert_eq!(site.answer().await.text(), "taken");
        site.send(rest).await;
        assert_eq!(reports.recv().await.unwrap(), body);
        site.send(post("Content-Length: 2\r\n", "ok")).await;
        assert_eq!(site.answer().await.text(), "taken");
        assert_eq!(reports.recv().await.unwrap(), "ok");
    });
}

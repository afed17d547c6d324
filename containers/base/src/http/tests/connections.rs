//! A connection's time: deadlines, keep-alive, ends of all kinds, and being taken apart.
use std::task::Poll;

use super::*;
use crate::http::{connection::Heard, upgrade::OnUpgrade};

fn brief() -> Limits {
    let (head_timeout, idle_timeout) = (Duration::from_millis(400), Duration::from_millis(600));
    Limits { head_timeout, idle_timeout, ..Limits::default() }
}

#[test]
fn half_a_head_is_cut_at_its_deadline_however_it_trickles() {
    run(async {
        for begin in ["", "G", "GET /function/echo HTTP/1.1\r\nHost: a\r\nX: "] {
            let mut site = Site::with(Protocol::Http, brief(), tower::service_fn(greet));
            site.send(begin).await;
            assert_eq!(site.answer().await.status, 408, "{begin}");
            assert!(site.ended().await);
        }
        let mut site = Site::with(Protocol::Http, brief(), tower::service_fn(greet));
        site.send(get("")).await;
        assert_eq!(site.answer().await.text(), "hi");
        let begin = std::time::Instant::now();
        site.send("GET /function/echo HTTP/1.1\r\nHost: a\r\nX: ").await;
        let (mut reader, mut writer) = site.client.split();
        let trickle = async {
            while writer.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let mut received = [0; 12];
        tokio::select! {
            () = trickle => panic!("the connection ended without an answer"),
            read = reader.read_exact(&mut received) => read.unwrap(),
        };
        assert_eq!(&received, b"HTTP/1.1 408");
        assert!(begin.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn an_idle_connection_ends_without_a_word() {
    run(async {
        let mut site = Site::with(Protocol::Http, brief(), tower::service_fn(greet));
        for _ in 0..3 {
            site.send(get("")).await;
            assert_eq!(site.answer().await.text(), "hi");
        }
        assert_eq!(site.rest().await, b"");
    });
}

#[test]
fn a_body_that_stops_is_a_request_that_timed_out() {
    run(async {
        let mut site = Site::with(Protocol::Http, brief(), tower::service_fn(echo_whole));
        site.send("POST /function/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf").await;
        assert_eq!(site.answer().await.status, 408);
        assert!(site.ended().await);
    });
}

#[test]
fn a_client_that_stops_reading_is_given_up() {
    run(async {
        let mut site = Site::with(
            Protocol::Http,
            brief(),
            tower::service_fn(|_: Request<Body>| async {
                Ok::<_, Infallible>(Response::new(Body::from(vec![b'x'; 64 << 20])))
            }),
        );
        site.send(get("")).await;
        site.served.await.unwrap();
    });
}

#[test]
fn a_handler_may_take_longer_than_any_of_these() {
    run(async {
        let mut site = Site::with(
            Protocol::Http,
            brief(),
            tower::service_fn(|_: Request<Body>| async {
                tokio::time::sleep(Duration::from_millis(1000)).await;
                Ok::<_, Infallible>(Response::new(Body::from("late")))
            }),
        );
        site.send(get("")).await;
        assert_eq!(site.answer().await.text(), "late");
    });
}

#[test]
fn whoever_ends_its_side_still_gets_its_answers() {
    run(async {
        let site = Site::new(tower::service_fn(|_: Request<Body>| async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok::<_, Infallible>(Response::new(Body::from("late")))
        }));
        let received = site.all(get("") + &get("")).await;
        let answers = Answer::parse_all(received.as_bytes(), &["GET", "GET"]);
        assert!(answers.iter().all(|answer| answer.text() == "late"));
    });
}

#[test]
fn versions_and_wishes_decide_whether_it_goes_on() {
    run(async {
        for (version, wish, goes_on, says) in [
            ("1.1", "", true, None),
            ("1.1", "Connection: keep-alive\r\n", true, None),
            ("1.1", "Connection: close\r\n", false, Some("close")),
            ("1.1", "Connection: x,Close , y\r\n", false, Some("close")),
            ("1.1", "Connection: keep-alive\r\nConnection: close\r\n", false, Some("close")),
            ("1.0", "", false, Some("close")),
            ("1.0", "Connection: Keep-Alive\r\n", true, Some("keep-alive")),
            ("1.0", "Connection: keep-alive, close\r\n", false, Some("close")),
        ] {
            let mut site = Site::new(tower::service_fn(greet));
            site.send(format!("GET /function/echo HTTP/{version}\r\nHost: a\r\n{wish}\r\n")).await;
            let answer = site.answer().await;
            assert_eq!((answer.text(), answer.field("connection")), ("hi", says), "{version} {wish}");
            if goes_on {
                site.send(get("")).await;
                assert_eq!(site.answer().await.text(), "hi");
            } else {
                assert!(site.ended().await);
            }
        }
    });
}

#[test]
fn a_handler_and_a_limit_can_end_it_too() {
    run(async {
        let mut site = Site::new(tower::service_fn(|_: Request<Body>| async {
            Response::builder().header("connection", "close").body(Body::from("bye"))
        }));
        site.send(get("")).await;
        assert_eq!(site.answer().await.field("connection"), Some("close"));
        assert!(site.ended().await);
        let limits = Limits { requests: 2, ..Limits::default() };
        let site = Site::with(Protocol::Http, limits, tower::service_fn(greet));
        let received = site.all(get("").repeat(3)).await;
        let answers = Answer::parse_all(received.as_bytes(), &["GET", "GET"]);
        assert_eq!(answers[0].field("connection"), None);
        assert_eq!(answers[1].field("connection"), Some("close"));
    });
}

#[test]
fn stopping_answers_what_comes_soon_and_ends_the_idle() {
    run(async {
        let mut idle = Site::new(tower::service_fn(greet));
        idle.send(get("")).await;
        assert_eq!(idle.answer().await.text(), "hi");
        idle.stop.request();
        assert_eq!(idle.rest().await, b"");

        // As if the request had been on its way.
        let mut asking = Site::new(tower::service_fn(greet));
        asking.send(get("")).await;
        assert_eq!(asking.answer().await.field("connection"), None);
        asking.stop.request();
        tokio::task::yield_now().await;
        asking.send(get("")).await;
        let received = asking.rest().await;
        let answer = &Answer::parse_all(&received, &["GET"])[0];
        assert_eq!((answer.text(), answer.field("connection")), ("hi", Some("close")));

        let mut busy = Site::new(tower::service_fn(echo_whole));
        busy.send(
            "POST /function/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n",
        )
        .await;
        assert_eq!(busy.answer().await.status, 100);
        busy.stop.request();
        busy.send("ok").await;
        let received = busy.rest().await;
        let answer = &Answer::parse_all(&received, &["POST"])[0];
        assert_eq!((answer.text(), answer.field("connection")), ("ok", Some("close")));
    });
}

#[test]
fn a_reset_ends_the_handler() {
    struct Told(Option<tokio::sync::oneshot::Sender<()>>);
    impl Drop for Told {
        fn drop(&mut self) {
            let _ = self.0.take().unwrap().send(());
        }
    }
    run(async {
        let (sender, ended) = tokio::sync::oneshot::channel();
        let sender = Rc::new(RefCell::new(Some(sender)));
        let (begin, mut begun) = tokio::sync::mpsc::unbounded_channel();
        let mut site = Site::new(tower::service_fn(move |_: Request<Body>| {
            let told = Told(sender.borrow_mut().take());
            begin.send(()).unwrap();
            async move {
                let _told = told;
                std::future::pending::<Result<Response<Body>, Infallible>>().await
            }
        }));
        site.send(get("")).await;
        begun.recv().await.unwrap();
        socket2::SockRef::from(&site.client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(site.client);
        ended.await.unwrap();
        site.served.await.unwrap();
    });
}

#[test]
fn between_requests_it_comes_apart_without_losing_a_byte() {
    run(async {
        let (mut client, socket) = sockets();
        let shared = shared(Limits::default());
        let mut connection =
            Connection::new(Stream::Plain(socket), Protocol::Http, Origin::default(), shared);
        let foreign = "POST /function/hello HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nhalf";
        std::io::Write::write_all(&mut client, foreign.as_bytes()).unwrap();
        let heard = std::future::poll_fn(|cx| connection.poll_head(cx)).await;
        assert!(matches!(heard, Ok(Heard::Head(length)) if length == foreign.len() - 4));
        let (stream, unread) = connection.into_parts();
        assert_eq!(unread, foreign);
        let fd = stream.into_socket().leave().unwrap();
        std::io::Write::write_all(&mut client, b"more").unwrap();
        let mut more = [0; 4];
        let mut taken = std::net::TcpStream::from(fd);
        taken.set_nonblocking(false).unwrap();
        std::io::Read::read_exact(&mut taken, &mut more).unwrap();
        assert_eq!(&more, b"more");
    });
}

#[test]
fn an_idle_connection_holds_no_buffers() {
    run(async {
        let (mut client, socket) = sockets();
        let shared = shared(Limits::default());
        let mut connection =
            Connection::new(Stream::Plain(socket), Protocol::Http, Origin::default(), shared);
        std::io::Write::write_all(&mut client, get("").as_bytes()).unwrap();
        let heard = std::future::poll_fn(|cx| connection.poll_head(cx)).await;
        assert!(matches!(heard, Ok(Heard::Head(_))));
        assert!(connection.input.capacity() > 0);
        let length = connection.input.len();
        let Ok(judged) = connection.judge(length) else { panic!("it is ours") };
        drop(judged);
        assert!(std::future::poll_fn(|cx| Poll::Ready(connection.poll_head(cx))).await.is_pending());
        assert_eq!(connection.input.capacity(), 0);
        let mut service = tower::service_fn(greet);
        let future_bytes = size_of_val(&connection.serve(&mut service)) + size_of::<Connection>();
        assert!(future_bytes < 512, "{future_bytes}");
    });
}

#[test]
fn an_upgrade_hands_the_stream_over_with_what_was_read() {
    async fn upgrade(mut request: Request<Body>) -> Result<Response<Body>, http::Error> {
        let Some(on_upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
            return Ok(Response::new(Body::from("plain")));
        };
        if request.uri().path() == "/no" {
            return Ok(Response::new(Body::from("no")));
        }
        spawn_local(async move {
            let mut stream = on_upgrade.await.unwrap();
            let mut bytes = [0; 4];
            while stream.read_exact(&mut bytes).await.is_ok() {
                bytes.make_ascii_uppercase();
                stream.write_all(&bytes).await.unwrap();
            }
        });
        Response::builder().status(101).header("upgrade", "shout").body(Body::empty())
    }
    let offer = |path: &str| {
        format!(
            "GET /function/echo{path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n"
        )
    };
    run(async {
        let mut site = Site::new(tower::service_fn(upgrade));
        // An offer that isn't taken, and requests without one, are answered as ever.
        site.send(offer("/no")).await;
        assert_eq!(site.answer().await.text(), "no");
        site.send(get("")).await;
        assert_eq!(site.answer().await.text(), "plain");
        site.send(offer("") + "fir").await;
        let answer = site.answer().await;
        assert_eq!(answer.status, 101);
        assert_eq!((answer.field("upgrade"), answer.field("connection")), (Some("shout"), Some("upgrade")));
        assert_eq!(answer.field("content-length"), None);
        site.send("stmore").await;
        site.half_close();
        assert_eq!(site.rest().await, b"FIRSTMOR");
    });
    run(async {
        // Without an offer there is nothing to switch to.
        let site = Site::new(tower::service_fn(|_: Request<Body>| async {
            Response::builder().status(101).body(Body::empty())
        }));
        assert!(site.all(get("")).await.starts_with("HTTP/1.1 500 "));
    });
}

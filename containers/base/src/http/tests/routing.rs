//! Whose requests reach the handler, and what it is told about them.
use super::*;
use crate::{OriginalUri, PeerAddr};

async fn describe(request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let original = &request.extensions().get::<OriginalUri>().unwrap().0;
    let host = request.headers()[http::header::HOST].to_str().unwrap();
    let peer = request.extensions().get::<PeerAddr>().unwrap().get().unwrap();
    Ok(Response::new(Body::from(format!("{} {original} {host} {peer}", request.uri()))))
}

async fn ask(protocol: Protocol, target: &str, host: &str) -> (u16, String, bool) {
    let mut site = Site::with(protocol, Limits::default(), tower::service_fn(describe));
    let client = site.client.local_addr().unwrap().to_string();
    site.send(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
    let answer = site.answer().await;
    let goes_on = answer.field("connection").is_none();
    site.half_close();
    assert_eq!(site.rest().await, b"");
    (answer.status, answer.text().replace(&client, "CLIENT"), goes_on)
}

#[test]
fn a_handler_sees_its_part_of_the_path_and_the_whole() {
    run(async {
        for (target, host, seen) in [
            ("/function/echo", "a", "/ /function/echo a CLIENT"),
            ("/function/echo/", "a", "/ /function/echo/ a CLIENT"),
            ("/function/echo?x=1", "a", "/?x=1 /function/echo?x=1 a CLIENT"),
            ("/function/echo/a/../b%20?", "a", "/a/../b%20? /function/echo/a/../b%20? a CLIENT"),
            ("http://h:1/function/echo/x", "a", "/x http://h:1/function/echo/x h:1 CLIENT"),
            ("/function/echo", "hello.faas.local", "/ /function/echo hello.faas.local CLIENT"),
        ] {
            for protocol in [Protocol::Http, Protocol::Https] {
                assert_eq!(ask(protocol, target, host).await, (200, seen.to_owned(), true), "{target}");
            }
        }
        for (target, host, seen) in [
            ("/x?y", "echo.faas.local", "/x?y /x?y echo.faas.local CLIENT"),
            ("https://echo.localhost", "b", "/ https://echo.localhost/ echo.localhost CLIENT"),
            ("https://h?x", "b", "/?x https://h/?x h CLIENT"),
        ] {
            assert_eq!(ask(Protocol::Https, target, host).await, (200, seen.to_owned(), true), "{target}");
        }
    });
}

#[test]
fn everybody_elses_requests_are_refused() {
    run(async {
        for (protocol, target, host, status, goes_on) in [
            (Protocol::Http, "/", "echo.faas.local", 404, true),
            (Protocol::Http, "/FUNCTION/echo", "a", 404, true),
            (Protocol::Http, "/function/%65cho", "a", 404, true),
            (Protocol::Https, "/function/Echo", "a", 404, true),
            (Protocol::Http, "/function/hello", "a", 421, false),
            (Protocol::Http, "/function/echoevil", "a", 421, false),
            (Protocol::Https, "/function/hello", "echo.faas.local", 421, false),
            (Protocol::Https, "/", "hello.faas.local", 421, false),
            (Protocol::Https, "https://hello.localhost/", "echo.localhost", 421, false),
        ] {
            let (got, text, went_on) = ask(protocol, target, host).await;
            assert_eq!((got, went_on), (status, goes_on), "{target} {host}: {text}");
            assert!(text.ends_with(".\n"), "{text}");
        }
    });
}

#[test]
fn a_connection_goes_on_behind_a_path_that_isnt_there() {
    run(async {
        let mut site = Site::new(tower::service_fn(greet));
        site.send("HEAD /favicon.ico HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let answer = site.answer_to("HEAD").await;
        assert_eq!(answer.status, 404);
        assert!(answer.body.is_empty() && answer.field("content-length").is_some());
        site.send(get("")).await;
        assert_eq!(site.answer().await.text(), "hi");
        site.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx").await;
        let answer = site.answer().await;
        assert_eq!((answer.status, answer.field("connection")), (404, Some("close")));
        assert!(site.ended().await);
    });
}

#[test]
fn the_asterisk_is_for_options() {
    run(async {
        let service = || tower::service_fn(describe);
        let site = Site::with(Protocol::Https, Limits::default(), service());
        let received = site.all("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(received.contains("\r\n\r\n* * a "), "{received}");
        let site = Site::with(Protocol::Https, Limits::default(), service());
        assert!(site.all("GET * HTTP/1.1\r\nHost: a\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
        let site = Site::with(Protocol::Http, Limits::default(), service());
        assert!(site.all("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").await.starts_with("HTTP/1.1 404 "));
    });
}

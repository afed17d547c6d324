//! Handlers of all sorts: routers, services that fail, that panic, that aren't Send.
use axum::{
    Router,
    extract::{Path, Query},
    routing::{get as on_get, post},
};

use super::*;

#[test]
fn an_axum_router_is_a_function() {
    let router = || {
        Router::new()
            .route("/", on_get(|| async { "root" }))
            .route("/users/{id}", on_get(|Path(id): Path<u32>| async move { format!("user {id}") }))
            .route("/length", post(|body: String| async move { body.len().to_string() }))
            .route(
                "/query",
                on_get(|Query(query): Query<Vec<(String, String)>>| async move { format!("{query:?}") }),
            )
            .route("/echo", post(|body: axum::body::Body| async { body }))
    };
    run(async {
        let mut site = Site::new(router());
        for (request, status, text) in [
            (get(""), 200, "root"),
            (get("/users/7"), 200, "user 7"),
            (get("/users/x"), 400, ""),
            (get("/query?a=b%20c"), 200, "[(\"a\", \"b c\")]"),
            (get("/nowhere"), 404, ""),
            (
                "POST /function/echo/length HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n[1,2,3]"
                    .to_owned(),
                200,
                "7",
            ),
            ("DELETE /function/echo/length HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), 405, ""),
        ] {
            site.send(&request).await;
            let answer = site.answer().await;
            assert_eq!(answer.status, status, "{request}");
            if status == 200 {
                assert_eq!(answer.text(), text);
            }
        }
        site.send("HEAD /function/echo HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(site.answer_to("HEAD").await.field("content-length"), Some("4"));
        let body = "x".repeat(300_000);
        site.send(format!(
            "POST /function/echo/echo HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
            body.len()
        ))
        .await;
        let Site { client, .. } = &mut site;
        let (mut reader, mut writer) = client.split();
        let mut received = Vec::new();
        let read = async {
            while Answer::parse(&received, "POST", false).is_none() {
                assert_ne!(reader.read_buf(&mut received).await.unwrap(), 0);
            }
        };
        let (written, ()) = tokio::join!(writer.write_all(body.as_bytes()), read);
        written.unwrap();
        assert!(Answer::parse(&received, "POST", false).unwrap().0.text() == body);
    });
}

#[test]
fn a_handler_that_fails_or_panics_is_a_500_and_only_that() {
    async fn fail(
        request: Request<Body>,
    ) -> Result<Response<Body>, Box<dyn std::error::Error + Send + Sync>> {
        match request.uri().path() {
            "/error" => Err("on purpose".into()),
            "/panic" => panic!("on purpose"),
            "/interim" => Ok(Response::builder().status(103).body(Body::empty())?),
            _ => Ok(Response::new(Body::from("fine"))),
        }
    }
    run(async {
        for path in ["/error", "/panic", "/interim"] {
            let site = Site::new(tower::service_fn(fail));
            let received = site.all(get("/fine") + &get(path) + &get("/fine")).await;
            let answers = Answer::parse_all(received.as_bytes(), &["GET", "GET"]);
            assert_eq!(answers[0].text(), "fine");
            assert_eq!((answers[1].status, answers[1].field("connection")), (500, Some("close")));
            assert!(!answers[1].text().contains("purpose"), "what went wrong is not the client's to know");
        }
    });
}

#[test]
fn a_service_that_isnt_ready_is_waited_for() {
    #[derive(Clone, Default)]
    struct Busy(Rc<RefCell<u8>>);
    impl tower_service::Service<Request<Body>> for Busy {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
            *self.0.borrow_mut() += 1;
            if *self.0.borrow() < 3 {
                cx.waker().wake_by_ref();
                return std::task::Poll::Pending;
            }
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            std::future::ready(Ok(Response::new(Body::from(self.0.borrow().to_string()))))
        }
    }
    run(async {
        let received = Site::new(Busy::default()).all(get("")).await;
        assert_eq!(Answer::parse_all(received.as_bytes(), &["GET"])[0].text(), "3");
    });
}

#[test]
fn a_handler_can_leave_the_thread_and_come_back() {
    run(async {
        let site = Site::new(tower::service_fn(|_: Request<Body>| async {
            let text = tokio::task::spawn_blocking(|| "from elsewhere").await?;
            Ok::<_, tokio::task::JoinError>(Response::new(Body::from(text)))
        }));
        let received = site.all(get("").repeat(2)).await;
        let answers = Answer::parse_all(received.as_bytes(), &["GET", "GET"]);
        assert!(answers.iter().all(|answer| answer.text() == "from elsewhere"));
    });
}

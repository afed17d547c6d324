//! The echo function: answers with what it was sent, or describes a request that carries nothing.
use std::{convert::Infallible, process::ExitCode};

use base::Body;
use http::{
    HeaderMap, HeaderValue, Request, Response,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};
use serde_json::{Map, Value, json};

fn main() -> ExitCode {
    base::serve(|| tower::service_fn(|request| async { Ok::<_, Infallible>(answer(request)) }))
}

fn answer(request: Request<Body>) -> Response<Body> {
    if http_body::Body::is_end_stream(request.body()) {
        return describe(&request);
    }
    let (head, body) = request.into_parts();
    let mut response = Response::new(body);
    let content_type = head.headers.get(CONTENT_TYPE).cloned();
    let content_type = content_type.unwrap_or(HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    // The bytes are the client's own, so what they are encoded with is, too.
    if let Some(encoding) = head.headers.get(CONTENT_ENCODING) {
        response.headers_mut().insert(CONTENT_ENCODING, encoding.clone());
    }
    response
}

fn describe(request: &Request<Body>) -> Response<Body> {
    let description = json!({
        "method": request.method().as_str(),
        "path": request.uri().path(),
        "query": request.uri().query(),
        "headers": fields(request.headers()),
    });
    let mut response = Response::new(Body::from(format!("{description}\n")));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The fields by name; the values of a field that came several times are one list (RFC 9110 §5.3).
fn fields(headers: &HeaderMap) -> Map<String, Value> {
    let value = |name| {
        let values: Vec<_> =
            headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
        Value::String(values.join(", "))
    };
    headers.keys().map(|name| (name.as_str().to_owned(), value(name))).collect()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn text(response: Response<Body>) -> String {
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_body_comes_back_as_it_was() {
        let request = Request::post("/")
            .header(CONTENT_TYPE, "image/png")
            .header(CONTENT_ENCODING, "gzip")
            .body(Body::from("bytes"))
            .unwrap();
        let response = answer(request);
        assert_eq!(response.headers()[CONTENT_TYPE], "image/png");
        assert_eq!(response.headers()[CONTENT_ENCODING], "gzip");
        assert_eq!(text(response).await, "bytes");
        let response = answer(Request::put("/").body(Body::from("x")).unwrap());
        assert_eq!(response.headers()[CONTENT_TYPE], "application/octet-stream");
    }

    #[tokio::test]
    async fn a_request_without_a_body_is_described() {
        let request = Request::delete("/a/b?c=%20")
            .header("x-test", "one")
            .header("x-test", "\"two\"")
            .header("x-latin", HeaderValue::from_bytes(b"\xe9").unwrap())
            .body(Body::empty())
            .unwrap();
        let response = answer(request);
        assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
        let description: Value = serde_json::from_str(&text(response).await).unwrap();
        let expected = json!({
            "method": "DELETE",
            "path": "/a/b",
            "query": "c=%20",
            "headers": { "x-test": "one, \"two\"", "x-latin": "\u{fffd}" },
        });
        assert_eq!(description, expected);
    }
}

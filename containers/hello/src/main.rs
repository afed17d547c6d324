//! The hello function: greets by name, in the form that the client prefers.
mod accept;

use std::{borrow::Cow, convert::Infallible, process::ExitCode};

use base::Body;
use http::{
    HeaderName, HeaderValue, Request, Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE, VARY, X_CONTENT_TYPE_OPTIONS},
};
use percent_encoding::percent_decode;
use serde_json::json;

use accept::Form;

/// A greeting is for a person; no name is longer.
const NAME_BYTES: usize = 256;

fn main() -> ExitCode {
    base::serve(|| tower::service_fn(|request| async move { Ok::<_, Infallible>(answer(&request)) }))
}

fn answer(request: &Request<Body>) -> Response<Body> {
    let accepted = accept::prefer(request.headers().get_all(ACCEPT).iter().map(HeaderValue::as_bytes));
    let Some(form) = accepted else {
        let sentence = "A greeting comes as text/plain or application/json.";
        return respond(StatusCode::NOT_ACCEPTABLE, Form::Text, sentence);
    };
    match name(request.uri().query().unwrap_or_default()) {
        Ok(name) => respond(StatusCode::OK, form, &format!("Hello, {name}!")),
        Err(sentence) => respond(StatusCode::BAD_REQUEST, form, sentence),
    }
}

fn respond(status: StatusCode, form: Form, message: &str) -> Response<Body> {
    let (content_type, text) = match form {
        Form::Text => ("text/plain; charset=utf-8", format!("{message}\n")),
        Form::Json if status.is_success() => {
            ("application/json", format!("{}\n", json!({ "message": message })))
        }
        Form::Json => ("application/json", format!("{}\n", json!({ "error": message }))),
    };
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let fields: [(HeaderName, HeaderValue); 3] = [
        (CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (VARY, HeaderValue::from_static("accept")),
        // The name is the client's, and a browser must not take it for markup.
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    response.headers_mut().extend(fields);
    response
}

/// The first `name` of a query; nobody in particular without one.
fn name(query: &str) -> Result<String, &'static str> {
    let value = query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key) == Ok(Cow::Borrowed("name"))).then_some(value)
    });
    let name = decode(value.unwrap_or_default()).map_err(|_| "The name is not UTF-8.")?;
    match name.as_ref() {
        "" => Ok("World".to_owned()),
        name if name.len() > NAME_BYTES => Err("The name is longer than 256 bytes."),
        name if name.chars().any(char::is_control) => Err("The name has control characters."),
        name => Ok(name.to_owned()),
    }
}

/// `application/x-www-form-urlencoded`.
fn decode(text: &str) -> Result<Cow<'_, str>, std::str::Utf8Error> {
    let spaced = text.replace('+', " ");
    Ok(Cow::Owned(percent_decode(spaced.as_bytes()).decode_utf8()?.into_owned()))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn ask(target: &str, accept: &str) -> (u16, String, String) {
        let request = Request::get(target).header(ACCEPT, accept).body(Body::empty()).unwrap();
        let response = answer(&request);
        let status = response.status().as_u16();
        let content_type = response.headers()[CONTENT_TYPE].to_str().unwrap().to_owned();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, content_type, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn whoever_gives_a_name_is_greeted_by_it() {
        let text = "text/plain; charset=utf-8".to_owned();
        assert_eq!(ask("/", "*/*").await, (200, text.clone(), "Hello, World!\n".into()));
        assert_eq!(ask("/x?name=you", "*/*").await, (200, text.clone(), "Hello, you!\n".into()));
        assert_eq!(
            ask("/?a=b&n%61me=J%C3%B6rg+H.&name=x", "*/*").await,
            (200, text.clone(), "Hello, Jörg H.!\n".into())
        );
        assert_eq!(ask("/?name", "*/*").await.2, "Hello, World!\n");
        let longest = "x".repeat(NAME_BYTES);
        assert_eq!(ask(&format!("/?name={longest}"), "*/*").await.2, format!("Hello, {longest}!\n"));
    }

    #[tokio::test]
    async fn json_is_json_whatever_the_name() {
        let (status, content_type, body) = ask("/?name=%22%5C%3Cb%3E", "application/json").await;
        assert_eq!((status, content_type.as_str()), (200, "application/json"));
        let value: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(value, json!({ "message": "Hello, \"\\<b>!" }));
    }

    #[tokio::test]
    async fn what_is_no_name_is_refused_with_a_sentence() {
        assert_eq!(ask("/?name=%ff", "*/*").await.0, 400);
        assert_eq!(ask("/?name=%0a", "*/*").await.0, 400);
        let (status, _, body) = ask(&format!("/?name={}", "x".repeat(257)), "application/json").await;
        assert_eq!(status, 400);
        assert_eq!(body, "{\"error\":\"The name is longer than 256 bytes.\"}\n");
        assert_eq!(ask("/", "image/png").await.0, 406);
    }
}

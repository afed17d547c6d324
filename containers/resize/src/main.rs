//! The resize function: PNG, JPEG or WebP in, the same picture in another size or format out.
mod geometry;
mod parameters;
mod picture;
mod refusal;
mod workshop;

use std::{convert::Infallible, process::ExitCode, sync::Arc};

use base::Body;
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS},
};

use parameters::Parameters;
use refusal::Refusal;
use workshop::Workshop;

const USAGE: &str = "\
Send a PNG, JPEG or WebP picture with POST or PUT and get it back in another size:

    curl --data-binary @picture.jpg 'http://localhost:8080/function/resize?width=300' -o small.jpg

    width, height   pixels; with one of them the other follows from the picture's proportions
    fit             contain (as large as fits, the default), cover (fills, cropped at its middle), fill (distorted)
    format          png, jpeg or webp (lossless); the picture's own if not given

A photo is turned upright as its EXIF data says. Only the first frame of an animation is used.
";

fn main() -> ExitCode {
    let workshop = Arc::new(Workshop::new());
    base::serve(move || {
        let workshop = Arc::clone(&workshop);
        tower::service_fn(move |request| {
            let workshop = Arc::clone(&workshop);
            async move { Ok::<_, Infallible>(answer(&workshop, request).await) }
        })
    })
}

async fn answer(workshop: &Workshop, request: Request<Body>) -> Response<Body> {
    match *request.method() {
        Method::GET | Method::HEAD => text(StatusCode::OK, USAGE.to_owned()),
        Method::OPTIONS => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            allow(response)
        }
        Method::POST | Method::PUT => match resize(workshop, request).await {
            Ok(picture) => respond(StatusCode::OK, picture.format.media_type(), Body::from(picture.bytes)),
            Err(refusal) => refuse(&refusal),
        },
        _ => allow(refuse(&Refusal::Method)),
    }
}

async fn resize(workshop: &Workshop, request: Request<Body>) -> Result<picture::Picture, Refusal> {
    let parameters = Parameters::parse(request.uri().query().unwrap_or_default())?;
    if request.headers().contains_key(CONTENT_ENCODING) {
        return Err(Refusal::ContentEncoding);
    }
    let upload = workshop.receive(request.into_body()).await?;
    workshop.work(move || picture::resize(&upload.bytes, &parameters)).await
}

fn refuse(refusal: &Refusal) -> Response<Body> {
    let mut response = text(refusal.status(), format!("{refusal}\n"));
    match refusal {
        Refusal::Saturated => response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1")),
        // The rest of its body is not waited for (RFC 9110 §15.5.9).
        Refusal::TooSlow => response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close")),
        _ => None,
    };
    response
}

fn allow(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, OPTIONS"));
    response
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    respond(status, "text/plain; charset=utf-8", Body::from(text))
}

fn respond(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let fields: [(HeaderName, HeaderValue); 2] = [
        (CONTENT_TYPE, HeaderValue::from_static(content_type)),
        // What is in a picture is the client's, and a browser must not take it for markup.
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    response.headers_mut().extend(fields);
    response
}

#[cfg(test)]
mod tests;

//! Answers on the admin listener, in a thread of its own.
use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, thread, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};

use super::{
    metrics,
    report::{About, Report},
    snapshot::{Inquiry, Snapshot},
};
use crate::kernel::inspect::Inspection;

/// Whoever scrapes needs one, whoever looks another; more wait in the listener's queue.
const CONNECTIONS: usize = 16;

/// One request and its answer, which is all that a connection is for: whoever is slower makes room.
const CONNECTION_TIME: Duration = Duration::from_secs(10);

/// A loop that doesn't answer for so long serves nobody either.
const LOOP_PATIENCE: Duration = Duration::from_secs(2);

/// How long accepting rests when it fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

const TEXT: &str = "text/plain; charset=utf-8";

const INDEX: &str = "\
/metrics  for Prometheus
/status   everything, as JSON; `pointsman status` and `pointsman top` show it
/healthz  200 while the gateway's loop runs
/readyz   200 while connections get answers
";

/// The admin listener, bound and not yet served.
pub struct Server {
    listener: std::net::TcpListener,
}

struct Site {
    about: About,
    gateway: mpsc::Sender<Inquiry>,
    inspection: Option<Inspection>,
}

impl Server {
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers from now on until the process ends.
    pub fn start(
        self,
        about: About,
        gateway: mpsc::Sender<Inquiry>,
        inspection: Option<Inspection>,
    ) -> io::Result<()> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let site = Site { about, gateway, inspection };
        thread::Builder::new().name("admin".to_owned()).spawn(move || {
            runtime.block_on(async {
                if let Err(error) = serve(self.listener, site).await {
                    tracing::error!(%error, "the admin listener can't be served");
                }
            });
        })?;
        Ok(())
    }
}

async fn serve(listener: std::net::TcpListener, site: Site) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let tasks = tokio::task::LocalSet::new();
    let site = std::rc::Rc::new(site);
    tasks
        .run_until(async {
            loop {
                // Never closed, so there is always a permit to wait for.
                let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let site = std::rc::Rc::clone(&site);
                        tokio::task::spawn_local(async move {
                            converse(stream, &site).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::debug!(%error, "an admin connection can't be accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        })
        .await;
    Ok(())
}

async fn converse(stream: TcpStream, site: &Site) {
    let service = service_fn(|request| async move { Ok::<_, Infallible>(site.answer(&request).await) });
    let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an admin connection failed"),
        Err(_) => tracing::debug!("an admin connection took too long"),
    }
}

impl Site {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD are answered here.\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/" => text(StatusCode::OK, INDEX),
            "/healthz" => match self.snapshot().await {
                Ok(_) => text(StatusCode::OK, "ok\n"),
                Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
            },
            "/readyz" => match self.report().await {
                Ok(report) if report.is_ready() => text(StatusCode::OK, "ready\n"),
                Ok(_) => text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "refusal, which answers for connections that belong to nobody, is not up\n",
                ),
                Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
            },
            "/metrics" => self.rendered(metrics::CONTENT_TYPE, metrics::render).await,
            "/status" => self.rendered("application/json", serde_json::to_string).await,
            _ => text(StatusCode::NOT_FOUND, INDEX),
        }
    }

    async fn rendered<E: std::fmt::Display>(
        &self,
        content_type: &'static str,
        render: impl FnOnce(&Report) -> Result<String, E>,
    ) -> Response<Full<Bytes>> {
        match self.report().await.map(|report| render(&report)) {
            Ok(Ok(body)) => {
                let mut response = text(StatusCode::OK, body);
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
                response
            }
            Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
        }
    }

    async fn report(&self) -> Result<Report, &'static str> {
        let snapshot = self.snapshot().await?;
        Ok(Report::new(&self.about, &snapshot, self.inspection.as_ref()))
    }

    async fn snapshot(&self) -> Result<Snapshot, &'static str> {
        let (inquiry, answer) = oneshot::channel();
        let asked = async {
            self.gateway.send(inquiry).await.ok()?;
            answer.await.ok()
        };
        match timeout(LOOP_PATIENCE, asked).await {
            Ok(Some(snapshot)) => Ok(snapshot),
            Ok(None) => Err("the gateway is stopping\n"),
            Err(_) => Err("the gateway's loop does not answer\n"),
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
